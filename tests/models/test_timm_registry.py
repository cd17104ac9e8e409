"""Our networks as timm's own: what its test suite asks of every network, asked of ours."""

import subprocess
import sys
import warnings

import pytest
import torch
from helpers.trees import ROOT
from torch import nn

import models
from models import create_model, register_with_timm
from models.weights import describe_network
from utils.runs import checkpoint

timm = pytest.importorskip("timm")

NAMES = register_with_timm()
QUICK = ("eca_net_resnet18", "eca_net_mobilenetv2")


def test_every_eca_network_is_known():
    wanted = {f"eca_net_{name.removeprefix('eca_')}" for name in models.MODELS if "eca_" in name}
    assert set(NAMES) == wanted - {"eca_net_mobilenet_v2"}
    assert set(timm.list_models("eca_net_*")) == set(NAMES)
    assert "eca_net_resnet50" in timm.list_models(module="timm_registry")


def test_a_second_call_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert register_with_timm() == NAMES


@pytest.mark.parametrize("name", QUICK)
def test_it_is_our_network_by_name_and_value(name):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7)
    torch.manual_seed(0)
    ours = create_model(name.replace("eca_net_", "eca_"), num_classes=7)
    assert describe_network(theirs) == describe_network(ours)
    own = theirs.state_dict()
    assert list(own) == list(ours.state_dict())
    assert all(torch.equal(own[key], value) for key, value in ours.state_dict().items())


# What follows is asked in the form of timm's tests/test_models.py.


@pytest.mark.parametrize("name", QUICK)
def test_model_default_cfgs(name):
    network = timm.create_model(name).eval()
    keys, configuration = network.state_dict().keys(), network.default_cfg
    images = torch.randn(1, *configuration["input_size"])
    pool = tuple(configuration["pool_size"])
    with torch.no_grad():
        assert network.forward_features(images).shape[-2:] == pool
        network.reset_classifier(0)
        out = network(images)
        assert out.shape == (1, network.num_features)
        assert network.forward_head(network.forward_features(images), pre_logits=True).equal(out)
        network.reset_classifier(0, "")
        assert network(images).shape[-2:] == pool
    assert f"{configuration['classifier']}.weight" in keys
    assert f"{configuration['first_conv']}.weight" in keys


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("form", ["torchscript", "fx"])
def test_model_forward_as_a_graph(name, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = timm.create_model(name, scriptable=True).eval()
        build = torch.jit.script if form == "torchscript" else torch.fx.symbolic_trace
        graph = build(network)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(graph(images), network(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "fx", "getter"])
def test_model_forward_features(name, wrapper):
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True, feature_cls=wrapper).eval()
    torch.manual_seed(0)
    ours = models.FeatureMaps(create_model(name.replace("eca_net_", "eca_"))).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        out, expected = network(images), ours(images)
    out = list(out.values()) if wrapper == "dict" else out
    assert network.feature_info.channels() == ours.feature_info.channels()
    assert network.feature_info.reduction() == [2, 4, 8, 16, 32]
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    some = timm.create_model(name, features_only=True, feature_cls=wrapper, out_indices=(2, 4))
    assert some.feature_info.channels() == ours.feature_info.channels()[2::2]
    assert len(some.eval()(images)) == 2


def test_weights_of_a_file(tmp_path):
    """Of ours and in the authors' form, into as many classes and into others."""
    torch.manual_seed(0)
    ours = create_model("eca_resnet18", num_classes=1000).eval()
    own = tmp_path / "best.pth"
    checkpoint.save(own, {**describe_network(ours), "state_dict": ours.state_dict()})
    released = tmp_path / "released.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in ours.state_dict().items()}}, released)
    for file in (own, released):
        given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
        whole = timm.create_model("eca_net_resnet18", **given)
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in whole.state_dict().items())
        part = timm.create_model("eca_net_resnet18", num_classes=5, **given)
        assert torch.equal(part.layer4[1].eca.conv.weight, ours.layer4[1].eca.conv.weight)
        assert part.fc.out_features == 5


# What timm's train.py hands to its factory if no flag is given, besides the name.
OF_THE_SCRIPT = {"pretrained": False, "in_chans": 3, "drop_rate": 0.0, "scriptable": False}
OF_THE_SCRIPT |= {"checkpoint_path": "", "num_classes": None, "drop_path_rate": None}
OF_THE_SCRIPT |= dict.fromkeys(("drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))


@pytest.mark.parametrize("name", QUICK)
def test_timm_s_training_script_builds_it(name):
    network = timm.create_model(name, **OF_THE_SCRIPT)
    assert network.num_classes == 1000
    assert all(m.p == 0 for m in network.modules() if isinstance(m, nn.Dropout))


def test_the_script_s_flags_reach_the_network():
    flags = {"num_classes": 5, "drop_path_rate": 0.3, "bn_momentum": 0.02, "bn_eps": 1e-3}
    given = {**OF_THE_SCRIPT, **flags, "output_stride": 32, "dtype": torch.float64}
    for name, dropout in (("eca_net_resnet18", 0.0), ("eca_net_mobilenetv2", 0.1)):
        network = timm.create_model(name, **{**given, "drop_rate": dropout})
        blocks = [m.drop_path for m in network.modules() if hasattr(type(m), "drop_path")]
        assert blocks == pytest.approx([0.3 * i / (len(blocks) - 1) for i in range(len(blocks))])
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.momentum, m.eps) for m in norms} == {(0.02, 1e-3)}
        rates = [m.p for m in network.modules() if isinstance(m, nn.Dropout)]
        assert rates == [0.1] * (dropout > 0)
        assert {p.dtype for p in network.parameters()} == {torch.float64}
    untouched = timm.create_model("eca_net_mobilenetv2")
    assert [m.p for m in untouched.modules() if isinstance(m, nn.Dropout)] == [0.25]
    assert untouched.features[0][1].eps == 1e-5


@pytest.mark.parametrize("name", [*QUICK, "eca_net_resnet50"])
def test_timm_counts_the_layers_as_we_do(name):
    """By its layer decay, and stages by the coarse count."""
    network = timm.create_model(name, num_classes=5)
    names = {id(p): name for name, p in network.named_parameters()}
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(network, 0.05, layer_decay=0.7)
    found = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert found == pytest.approx(models.layer_scales(network, 0.7))
    blocks = sum(hasattr(type(m), "drop_path") for m in network.modules())
    assert len(set(found.values())) == blocks + 2  # ten of ResNet-18
    coarse = timm.models.group_parameters(network, network.group_matcher(coarse=True))
    assert len(coarse) == 2 + (7 if "mobilenet" in name else 4)
    assert [n for group in coarse.values() for n in group] == list(names.values())


def test_refuses_in_one_line():
    for wrong, message in [
        ({"output_stride": 16}, "has output_stride=32 alone, not 16"),
        ({"drop_rate": 0.2}, "has no dropout: leave drop_rate=0.2 out"),
        ({"drop_block_rate": 0.1}, "has no DropBlock: leave drop_block_rate=0.1 out"),
        ({"drop_path_rate": 1.0}, "from 0 to below 1"),
        ({"act_layer": "gelu", "aa_layer": "avg"}, "takes no aa_layer, act_layer: leave it out"),
        ({"pretrained": True}, "no weights to download: give a file"),
        ({"in_chans": 1}, "takes images of 3 channels, not in_chans=1"),
        ({"num_classes": -1}, "num_classes must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            timm.create_model("eca_net_resnet18", **wrong)


def test_timm_is_not_imported_before_it_is_asked_for():
    code = (
        "import sys, models; assert 'timm' not in sys.modules; sys.modules['timm'] = None\n"
        "try: models.register_with_timm()\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "timm is not installed: pip install timm\n", done.stderr

"""The table of networks: each one builds, runs and trains; what is wrong is said in one line."""

import copy
from functools import partial

import pytest
import torch
import torchvision

import models
from models import MODELS, create_model, list_models
from models.eca_module import ECALayer
from models.eca_resnet import Bottleneck, ResNet

ALIASES = {f"{kind}mobilenet_v2": f"{kind}mobilenetv2" for kind in ("", "eca_", "se_")}


def test_table():
    depths = (18, 34, 50, 101, 152)
    names = {f"{kind}resnet{d}" for kind in ("", "eca_", "se_") for d in depths}
    assert set(MODELS) == names | ALIASES.keys() | set(ALIASES.values())
    for name, constructor in MODELS.items():
        assert constructor.__name__ == ALIASES.get(name, name)


def test_names_by_pattern():
    assert list_models() == list(MODELS)
    assert list_models("eca_*50*") == ["eca_resnet50"]
    assert list_models("eca_resnet?8") == ["eca_resnet18"]
    assert list_models("*mobilenetv2") == ["eca_mobilenetv2", "se_mobilenetv2", "mobilenetv2"]
    assert list_models("eca") == list_models("ECA_*") == []
    assert create_model("resnet18", num_classes=2, pretrained=False).num_classes == 2


def test_what_is_public_shows():
    assert dir(models) == sorted(models.__all__)
    assert all(hasattr(models, name) for name in models.__all__)
    assert not [name for name in dir(models) if name.startswith("_") or name == "Any"]


@pytest.mark.parametrize("name", MODELS)
def test_says_what_it_is(name):
    with torch.device("meta"):
        network = create_model(name, num_classes=11)
    attention = name.partition("_")[0] if name.startswith(("eca_", "se_")) else "none"
    assert (network.arch, network.attention) == (ALIASES.get(name, name), attention)
    assert (network.ksize is not None) == (attention == "eca")
    assert network.num_classes == network.get_submodule(network.head).out_features == 11


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ALIASES and not name.endswith(("101", "152"))]
)
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=7)
    logits = network(torch.randn(2, 3, 33, 33))
    assert logits.shape == (2, 7)
    (logits * torch.randn(2, 7)).sum().backward()
    for parameter_name, p in network.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        # A bias right before another BatchNorm cancels out, so 1-d parameters may have zeros.
        assert p.dim() == 1 or p.grad.abs().max() > 0, parameter_name


BUILDERS = (
    partial(ResNet, Bottleneck, (1, 1, 1, 1), ksize="3557"),
    partial(create_model, "eca_mobilenetv2", width_mult=0.25),
)


@pytest.mark.parametrize(
    "build",
    [BUILDERS[0], pytest.param(BUILDERS[1], marks=pytest.mark.slow)],
    ids=("resnet", "mobilenet"),
)
def test_compiles_whole(build):
    network, x = build(num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(network), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize("build", BUILDERS, ids=("resnet", "mobilenet"))
def test_precision_and_format(build):
    torch.manual_seed(0)
    network = build(num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1 * expected.std())
        network.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        assert network.forward_features(x[..., :33, :47]).shape[2:] == (2, 2)
        features = network.forward_features(x)
        assert features.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-3 * expected.std())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("training", [False, True])
def test_without_attention_it_is_torchvisions(name, training):
    torch.manual_seed(0)
    dropout = {"dropout": 0.25} if name == "mobilenet_v2" else {}
    theirs, ours = torchvision.models.get_model(name, **dropout), create_model(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    models.set_fused(ours, False)  # the same modules in the same order, so the same bits
    x, logits = torch.randn(2, 3, 96, 80), []
    for network in (ours, theirs):
        network.train(training)
        torch.manual_seed(1)  # the same dropout
        with torch.no_grad():
            logits.append(network(x))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(*logits) or dropout
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "channels"), [("eca_resnet18", 512), ("eca_mobilenetv2", 1280)])
def test_any_input_size(name, channels):
    network = create_model(name, num_classes=3).eval()
    for size, map_size in (
        ((32, 32), (1, 1)),
        ((33, 64), (2, 2)),
        ((224, 96), (7, 3)),
        ((1, 1), (1, 1)),
    ):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert network.forward_features(x).shape == (2, channels, *map_size)
            assert network(x).shape == (2, 3)


@pytest.mark.parametrize(("name", "rel"), [("eca_resnet50", 0.05), ("eca_mobilenetv2", 0.2)])
def test_initialisation(name, rel):
    torch.manual_seed(0)
    network = create_model(name)
    for part, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            std = module.weight.std().item()
            assert std == pytest.approx((2 / fan_out) ** 0.5, rel=rel), part
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
        elif isinstance(module, torch.nn.Conv1d):  # torch's own: uniform within 1/√k
            assert module.weight.abs().max() <= module.kernel_size[0] ** -0.5
    if name == "eca_mobilenetv2":  # its last layer begins small
        assert network.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert network.classifier[1].bias.eq(0).all()


def test_ksize_reaches_the_layers():
    network = create_model("eca_resnet18", ksize="3,5,9,11", num_classes=2)
    found = [m.conv.kernel_size[0] for m in network.modules() if isinstance(m, ECALayer)]
    assert found == [3, 3, 5, 5, 9, 9, 11, 11]
    assert network.ksize == (3, 5, 9, 11)
    assert create_model("eca_resnet18", ksize="adaptive", num_classes=2).ksize == (3, 5, 5, 5)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("eca_resnet5O", {}, "unknown network 'eca_resnet5O'; did you mean eca_resnet50"),
        ("vgg", {}, "unknown network 'vgg'; known: eca_resnet18, .*list_models"),
        ("eca_net_mobilenetv2", {}, "did you mean eca_mobilenet_?v2"),
        ("eca_*50*", {}, r"models.list_models\('eca_\*50\*'\) finds eca_resnet50$"),
        ("eca_resnet50", {"pretrained": True}, "-a eca_resnet50 --pretrained FILE.*weights"),
        (
            "resnet50",
            {"ksize": "3557"},
            r"resnet50 \(.*\) has no ECA layer: leave `ksize=3557` out",
        ),
        ("eca_resnet50", {"ksize": "355"}, "ksize '355' is not 4 odd .* for example 3557"),
        ("eca_mobilenetv2", {"ksize": "3557"}, "ksize '3557' is not 2 or 7 odd .* example 13"),
        (
            "eca_resnet50",
            {"num_classes": -1},
            "num_classes must be 1 or more, .* last layer, not -1",
        ),
        ("eca_resnet50", {"out_indices": [1]}, "out_indices is for features_only=True"),
        ("eca_resnet18", {"features_only": True, "out_indices": [5]}, "use some of 0 to 4"),
        ("resnet18", {"attention": "ce"}, "unknown attention 'ce'"),
        ("resnet18", {"width_mult": 1.0}, "resnet18 takes no width_mult: leave it out"),
    ],
)
def test_refuses_in_one_line(name, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(name, **kwargs)
    assert "\n" not in str(caught.value)

"""The table of networks: each one builds, runs and trains; what is wrong is said in one line."""

import copy
from functools import partial

import pytest
import torch

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


@pytest.mark.parametrize(
    "build",
    [
        partial(ResNet, Bottleneck, (1, 1, 1, 1), ksize="3557"),
        partial(create_model, "eca_mobilenetv2", width_mult=0.25),
    ],
)
def test_precision_format_and_compilation(build):
    torch.manual_seed(0)
    network = build(num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        compiled = torch.compile(copy.deepcopy(network), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
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

"""Weights as torchvision, timm and others save them, against their own networks' outputs."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from models import create_model
from models.start import first_network
from models.weights import find_state_dict, load_weights, network_from_checkpoint, read_state_dict


def seeded(build):
    """A network whose BatchNorms differ from their start, as a trained one's do."""
    torch.manual_seed(0)
    network = build().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def plain():
    return seeded(lambda: torchvision.models.resnet18(num_classes=3))


IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))

WRAPPED = {
    "model": lambda w: {"model": w, "epoch": 3, "acc": 71.0},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {}},
    "net": lambda w: {"net": w, "acc": 93.1},
    "state_dict_ema": lambda w: {"state_dict": {"x": w["fc.bias"]}, "state_dict_ema": w},
    "model_ema": lambda w: {
        "model": {"x": w["fc.bias"]},
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": t for k, t in w.items()}},
    },
    "module.": lambda w: {f"module.{k}": t for k, t in w.items()},
    "_orig_mod.": lambda w: {"model": {f"_orig_mod.module.{k}": t for k, t in w.items()}},
    "model.": lambda w: {"state_dict": {f"model.{k}": t for k, t in w.items()}},
    "module.model.": lambda w: {f"module.model.{k}": t for k, t in w.items()},
    "backbone.": lambda w: {
        "state_dict": {
            (f"head.{k}" if k.startswith("fc.") else f"backbone.{k}"): t for k, t in w.items()
        }
    },
    "thop": lambda w: {**w, "total_ops": w["fc.bias"], "layer1.0.conv1.total_params": w["fc.bias"]},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_are_found_and_named(plain, kind):
    own = plain.state_dict()
    found, notes = read_state_dict(WRAPPED[kind](own))
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert len(notes) == (0 if kind == "module." else 1)
    network = network_from_checkpoint(WRAPPED[kind](own)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(network(IMAGES), plain(IMAGES))


def test_what_was_done_is_one_note(plain):
    own = {f"model.{name}": tensor for name, tensor in plain.state_dict().items()}
    file = {"model": {"x": torch.ones(1)}, "model_ema": {"n_averaged": torch.tensor(1), **own}}
    _, notes = first_network("resnet18", 3, pretrained=file, file="w.pth")
    assert notes == [
        "pretrained: w.pth",
        "  Loaded 122 tensors into resnet18.",
        "  Of another program's names: took what stands under model_ema (not model); "
        "dropped 1 n_averaged; took model. off the names.",
    ]


def test_a_name_that_comes_twice_is_refused(plain):
    own = plain.state_dict()
    with pytest.raises(ValueError, match=r"fc\.bias twice"):
        find_state_dict({**own, "head.fc.bias": own["fc.bias"]})


PLAIN = {
    "torchvision resnet18": ("eca_resnet18", lambda: torchvision.models.resnet18(num_classes=3)),
    "torchvision resnet50": ("eca_resnet50", lambda: torchvision.models.resnet50(num_classes=3)),
    "timm resnet18": ("eca_resnet18", lambda: timm.create_model("resnet18", num_classes=3)),
    "torchvision mobilenet_v2": (
        "eca_mobilenetv2",
        lambda: torchvision.models.mobilenet_v2(num_classes=3),
    ),
    "timm mobilenetv2_100": (
        "eca_mobilenetv2",
        lambda: timm.create_model("mobilenetv2_100", num_classes=3),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_weights_start_an_eca_network(name):
    arch, build = PLAIN[name]
    reference = seeded(build)
    network, notes = first_network(arch, 3, pretrained=reference.state_dict(), file="w.pth")
    count = {"eca_resnet18": 8, "eca_resnet50": 16, "eca_mobilenetv2": 17}[arch]
    assert f"  The weights have no attention: {count} attention kernels are new." in notes
    identical, notes = first_network(
        arch, 3, pretrained=reference.state_dict(), file="w.pth", identity_start=True
    )
    assert notes[-1].startswith(f"  {count} ECA layers begin without effect")
    with torch.inference_mode():
        wanted = reference(IMAGES)
        torch.testing.assert_close(identical.eval()(IMAGES), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network.eval()(IMAGES), wanted, rtol=1e-2)
    assert identical.state_dict().keys() == create_model(arch, num_classes=3).state_dict().keys()


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
def test_the_identity_start_is_exact_and_can_be_trained(arch):
    """The very bits of our own plain network, in training too, and every kernel has a gradient."""
    plain = seeded(lambda: create_model(arch, num_classes=3))
    eca, _ = first_network(
        f"eca_{arch}", 3, pretrained=plain.state_dict(), file="w", identity_start=True
    )
    for network in (plain, eca):
        for module in network.modules():
            module.fused = False
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for mode in (False, True):
        out = eca.train(mode)(IMAGES)
        assert torch.equal(out, plain.train(mode)(IMAGES))
    out.square().sum().backward()
    kernels = [p for name, p in eca.named_parameters() if p.ndim == 3]
    assert kernels
    assert all(k.grad.abs().max() > 0 for k in kernels)


def test_identity_start_is_refused_where_it_would_harm():
    ours = create_model("eca_resnet18", num_classes=3)
    with pytest.raises(ValueError, match=r"^w\.pth: holds trained attention kernels"):
        first_network(
            "eca_resnet18", 3, pretrained=ours.state_dict(), file="w.pth", identity_start=True
        )
    with pytest.raises(ValueError, match="attention is se: leave it out"):
        first_network("se_resnet18", 3, identity_start=True)
    assert len(first_network("eca_resnet18", 3, identity_start=True)[1]) == 1


def test_an_eca_resnet_of_timm_is_ours():
    """timm takes eq. 12's kernel sizes."""
    reference = seeded(
        lambda: timm.models.resnet.ResNet(
            timm.models.resnet.Bottleneck,
            (3, 4, 6, 3),
            num_classes=3,
            block_args={"attn_layer": "eca"},
        )
    )
    network = network_from_checkpoint(reference.state_dict()).eval()
    assert network.arch == "eca_resnet50"
    assert network.ksize == create_model("eca_resnet50", "adaptive").ksize
    with torch.inference_mode():
        torch.testing.assert_close(network(IMAGES), reference(IMAGES), rtol=1e-4, atol=1e-5)


def test_weights_without_a_last_layer_take_a_new_one(plain):
    own = {name: t for name, t in plain.state_dict().items() if not name.startswith("fc.")}
    network, notes = first_network("resnet18", 5, pretrained=own, file="w.pth")
    assert "  Left fc as initialised: the weights have no last layer." in notes
    assert torch.equal(network.conv1.weight, plain.conv1.weight)
    with pytest.raises(ValueError, match=r"2 missing: fc\.weight, fc\.bias"):
        load_weights(network, own)

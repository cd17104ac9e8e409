"""Convolutions whose weights are packed once, against float64 and against plain convolutions."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from models.inference import PackedConv2d, optimise_for_inference

KINDS = {
    "3x3": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1},
    "stride": {"in_channels": 6, "out_channels": 10, "kernel_size": 3, "stride": 2, "padding": 1},
    "1x1": {"in_channels": 16, "out_channels": 7, "kernel_size": 1},
    "depthwise": {"in_channels": 9, "out_channels": 9, "kernel_size": 3, "padding": 1, "groups": 9},
    "groups": {"in_channels": 8, "out_channels": 16, "kernel_size": 3, "groups": 4, "bias": False},
    "dilated": {
        "in_channels": 5,
        "out_channels": 4,
        "kernel_size": (3, 5),
        "dilation": 2,
        "padding": (2, 1),
    },
}
ACTS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6}


def operators_exist():
    return PackedConv2d.of(nn.Conv2d(4, 4, 1)).agrees()


needs_operators = pytest.mark.skipif(
    not operators_exist(), reason="this build or processor has no packed convolutions"
)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_float64_does(kind, activation):
    torch.manual_seed(0)
    conv = nn.Conv2d(**KINDS[kind])
    packed = PackedConv2d.of(conv, activation)
    for shape in ((2, conv.in_channels, 14, 11), (1, conv.in_channels, 7, 9)):
        x = 4 * torch.randn(shape)
        expected = ACTS[activation](copy.deepcopy(conv).double()(x.double()))
        for x_ in (x, x.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                found = packed(x_)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(packed(x_).double(), expected, rtol=1e-5, atol=1e-5)
            assert packed(x_).requires_grad  # a call with gradients is an ordinary one


@needs_operators
def test_changed_weights_are_packed_anew():
    packed = PackedConv2d.of(nn.Conv2d(4, 4, 3), "relu")
    x = torch.randn(1, 4, 8, 8)

    def compare():
        with torch.no_grad():
            found = packed(x)
            assert packed._packed is not None
            expected = F.conv2d(x, packed.weight, packed.bias).relu()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    compare()
    with torch.no_grad():
        packed.weight.mul_(-3)
    compare()
    packed.weight.data = torch.randn(4, 4, 3, 3)
    compare()
    packed.load_state_dict({"weight": torch.ones(4, 4, 3, 3), "bias": torch.zeros(4)})
    compare()


@needs_operators
def test_copies_pickles_and_state_dict_hold_parameters_alone():
    packed = PackedConv2d.of(nn.Conv2d(4, 4, 3), "relu6")
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        expected = packed(x)
        assert packed._packed is not None
        assert list(packed.state_dict()) == ["weight", "bias"]
        assert torch.equal(copy.deepcopy(packed)(x), expected)
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert again._packed is None
        assert torch.equal(again(x), expected)
        assert packed.double()(x.double()).dtype == torch.float64  # for which nothing is packed
        assert packed._packed is None


@needs_operators
@pytest.mark.parametrize("fault", ["missing", "wrong", "shape"])
def test_operators_that_are_missing_or_wrong_make_way(monkeypatch, fault):
    by_onednn = PackedConv2d._by_onednn

    def faulty(self, x, packed):
        y = by_onednn(self, x, packed)
        if fault == "missing":
            raise AttributeError("no such operator")
        return y * 1.01 if fault == "wrong" else y[:, 1:]

    monkeypatch.setattr(PackedConv2d, "_by_onednn", faulty)
    conv = nn.Conv2d(4, 4, 3)
    packed = PackedConv2d.of(conv)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(packed(x), conv(x))
    assert not packed.agrees()


def test_what_cannot_be_packed_is_an_ordinary_convolution():
    x = torch.randn(2, 4, 9, 9)
    for conv in (
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
    ):
        packed = PackedConv2d.of(conv)
        with torch.no_grad():
            assert torch.equal(packed(x), conv(x))
            assert packed._packed is None
    packed = PackedConv2d.of(nn.Conv2d(4, 4, 3))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        packed(x)
    assert packed._packed is None
    with torch.no_grad():
        assert packed(x[:0]).shape == (0, 4, 7, 7)
        assert packed(x[0]).shape == (4, 7, 7)
    with pytest.raises(ValueError, match="activation 'gelu' is not one of"):
        PackedConv2d.of(nn.Conv2d(4, 4, 3), "gelu")


@needs_operators
@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenetv2"])
def test_a_rebuilt_network_packs_all_its_convolutions(name):
    network = models.create_model(name, num_classes=5).eval()
    fast = optimise_for_inference(network, torch.float32)
    convolutions = [
        module
        for name, module in fast.named_modules()
        if isinstance(module, nn.Conv2d) and "attention" not in name.split(".")
        if not name.endswith(".gate")  # of one pooled value a channel
    ]
    x = torch.randn(2, 3, 64, 64)
    first = fast(x)
    assert all(type(conv) is PackedConv2d and conv._packed is not None for conv in convolutions)
    assert torch.equal(fast(x), first)
    torch.testing.assert_close(copy.deepcopy(fast)(x), first)
    with torch.inference_mode():
        assert torch.equal(fast(x), first)

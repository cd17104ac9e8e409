"""MobileNetV2: against torchvision's, the published row, and the contract of names."""

import pytest
import torch
import torchvision

from models.eca_mobilenetv2 import (
    MobileNetV2,
    eca_mobilenetv2,
    expand_ksize,
    mobilenetv2,
    se_mobilenetv2,
    shorten_ksize,
)
from models.eca_module import ECALayer

# output channels of the 17 inverted residuals
OUT = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]


def on_meta(constructor, **kwargs):
    with torch.device("meta"):
        return constructor(**kwargs)


def count(network):
    return sum(p.numel() for p in network.parameters())


def kernel_sizes(network):
    return [m.conv.kernel_size[0] for m in network.modules() if isinstance(m, ECALayer)]


def test_parameters():
    network = on_meta(eca_mobilenetv2)
    assert network.ksize == (1, 3)
    assert count(network) == 3_504_903
    assert round(count(network) / 2**20, 2) == 3.34
    assert count(on_meta(mobilenetv2)) == 3_504_872
    assert count(on_meta(se_mobilenetv2)) == 3_533_288  # 3.37 × 2^20; the paper prints 3.40


def test_kernel_sizes():
    assert kernel_sizes(on_meta(eca_mobilenetv2)) == [1 if c < 96 else 3 for c in OUT]
    assert kernel_sizes(on_meta(eca_mobilenetv2, ksize="59")) == [5 if c < 96 else 9 for c in OUT]
    adaptive = on_meta(eca_mobilenetv2, ksize="adaptive")
    assert adaptive.ksize == (3, 3, 3, 3, 3, 5, 5)
    assert kernel_sizes(adaptive) == [5 if c > 96 else 3 for c in OUT]
    again = on_meta(eca_mobilenetv2, ksize=adaptive.ksize)
    assert kernel_sizes(again) == kernel_sizes(adaptive)
    # narrower: "13" keeps its stages, eq. 12 follows the channels that there are
    assert kernel_sizes(on_meta(eca_mobilenetv2, width_mult=0.5)) == [1] * 10 + [3] * 7
    narrow = on_meta(eca_mobilenetv2, ksize="adaptive", width_mult=0.5)
    assert narrow.ksize == (3, 3, 3, 3, 3, 3, 5)


@pytest.mark.parametrize("ksize", [(1, 3), (3, 3), (3, 3, 3, 3, 3, 5, 5)])
def test_short_and_long_kernel_sizes_say_the_same(ksize):
    assert len(expand_ksize(ksize)) == 7
    assert shorten_ksize(expand_ksize(ksize)) == ksize


def test_names_and_shapes_are_those_of_the_released_weights():
    """Torchvision's, and a kernel in each block; the first has one convolution less."""
    expected = shapes_of(on_meta(torchvision.models.mobilenet_v2))
    for i, out in enumerate(OUT, start=1):
        last = 3 if i == 1 else 4
        expected[f"features.{i}.conv.{last}.conv.weight"] = (1, 1, 1 if out < 96 else 3)
    network = on_meta(eca_mobilenetv2)
    assert shapes_of(network) == expected
    assert network.classifier[0].p == 0.25


def shapes_of(network):
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}


def test_attention_stands_last_in_every_block():
    blocks = on_meta(eca_mobilenetv2).features[1:-1]
    assert len(blocks) == 17
    assert all(isinstance(block.conv[-1], ECALayer) for block in blocks)
    assert sum(block.residual for block in blocks) == 10


@pytest.mark.parametrize(
    ("width", "channels", "last"),
    [(0.35, [5, 8, 11, 22, 33, 56, 112], 1280), (1.4, [22, 33, 44, 89, 134, 224, 448], 1792)],
)
def test_widths_are_cut_not_rounded(width, channels, last):
    network = eca_mobilenetv2(width_mult=width, num_classes=3).eval()
    assert sorted({block.conv[-2].num_features for block in network.features[1:-1]}) == channels
    assert network.features[0][0].out_channels == int(32 * width)
    with torch.no_grad():
        assert network.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, last, 1, 1)


@pytest.mark.parametrize("width", [0, -1, 0.06, float("nan"), float("inf")])
def test_refuses_a_width_without_channels(width):
    with pytest.raises(ValueError, match="width_mult must be at least 1/16, such as"):
        MobileNetV2(width_mult=width)


def test_the_least_width_works_for_every_attention():
    for attention in ("none", "eca", "eca_ns", "se", "se_var1", "se_var2", "se_var3"):
        network = mobilenetv2(attention=attention, width_mult=1 / 16, num_classes=2)
        assert network(torch.randn(2, 3, 64, 64)).shape == (2, 2)

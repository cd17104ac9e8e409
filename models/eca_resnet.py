"""ResNets with ECA, with the attentions it is compared with, and with none.

With attention off the networks compute what torchvision's compute, under the same names.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import Attention, Kind, find_attention
from .classifier import (
    Classifier,
    Ksize,
    Stage,
    check_ksize,
    conv1x1,
    conv3x3,
    drop_branch,
    initialise_convolutions,
)
from .eca_module import ADAPTIVE, adaptive_kernel_size
from .fused.block_tail import block_tail, norm_act

WIDTHS = (64, 128, 256, 512)  # of the four stages, before a block's expansion


class _Block(nn.Module):
    """What both blocks share: attention, if any, under the name of its slot, and the shortcut."""

    fused = True  # operations as one wherever that is possible; `set_fused` sets it
    drop_path = 0.0  # probability of an image to skip the block in training; `set_drop_path`
    if TYPE_CHECKING:
        relu: nn.Module

    def _add_tail(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        attention: Attention | None,
        ksize: int | None,
    ) -> None:
        self.slot = attention.slot if attention else None
        if attention:
            self.add_module(attention.slot, attention.build(out_channels, ksize))
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )

    def tail(self, z: Tensor, bn: nn.Module, identity: Tensor) -> Tensor:
        """relu(attention(bn(z)) + identity)."""
        attention = getattr(self, self.slot) if self.slot else None
        if self.drop_path and self.training:
            branch = block_tail(z, bn, attention, fused=self.fused)
            return self.relu(drop_branch(branch, self.drop_path) + identity)
        return block_tail(z, bn, attention, identity, self.relu, self.fused)

    def scripted_tail(self, y: Tensor, identity: Tensor) -> Tensor:
        """relu(attention(y) + identity) in words that TorchScript knows."""
        if hasattr(self, "eca"):
            y = self.eca(y)  # type: ignore[operator]
        elif hasattr(self, "se"):
            y = self.se(y)  # type: ignore[operator]
        elif hasattr(self, "attention"):
            y = self.attention(y)  # type: ignore[operator]
        return self.relu(y + identity)

    def shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        return self.downsample(x)


class BasicBlock(_Block):
    """Two 3×3 convolutions, the first with the stride s: (N, C, H, W) → (N, width, H/s, W/s)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        attention: Attention | None,
        ksize: int | None,
    ):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self._add_tail(in_channels, width, stride, attention, ksize)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        if torch.jit.is_scripting():
            h = self.relu(self.bn1(self.conv1(x)))
            return self.scripted_tail(self.bn2(self.conv2(h)), identity)
        h = norm_act(self.conv1(x), self.bn1, self.relu, self.fused)
        return self.tail(self.conv2(h), self.bn2, identity)


class Bottleneck(_Block):
    """1×1, 3×3 with the stride s, 1×1: (N, C, H, W) → (N, 4·width, H/s, W/s)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        attention: Attention | None,
        ksize: int | None,
    ):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self._add_tail(in_channels, out_channels, stride, attention, ksize)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        if torch.jit.is_scripting():
            h = self.relu(self.bn1(self.conv1(x)))
            h = self.relu(self.bn2(self.conv2(h)))
            return self.scripted_tail(self.bn3(self.conv3(h)), identity)
        h = norm_act(self.conv1(x), self.bn1, self.relu, self.fused)
        h = norm_act(self.conv2(h), self.bn2, self.relu, self.fused)
        return self.tail(self.conv3(h), self.bn3, identity)


class ResNet(Classifier):
    """A ResNet with one attention layer a block, after its last BatchNorm and before the addition.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each of the four stages.
        attention: as `attention.find_attention` takes it.
        ksize: ECA's kernel size in each stage, as `parse_ksize` reads it; "adaptive" applies
            eq. 12 to the stage's output channels. Without ECA there is none to give.
        num_classes: rows of `fc`; 0 for none, see `Classifier`.
        arch: the name kept in checkpoints.

    Attributes:
        ksize: the four kernel sizes used ("adaptive" resolved), or None.

    Shape: (N, 3, H, W) → (N, num_classes), or (N, num_features) without classes.
    """

    head = "fc"
    fused = True  # likewise, of the stem
    if TYPE_CHECKING:
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        attention: Kind = "eca",
        ksize: Ksize = None,
        num_classes: int = 1000,
        arch: str = "resnet",
    ):
        super().__init__()
        channels = [width * block.expansion for width in WIDTHS]
        attention = find_attention(attention)
        ksize = check_ksize(arch, attention, ksize, stages=4)
        if ksize == ADAPTIVE:
            ksize = tuple(adaptive_kernel_size(c) for c in channels)
        self.arch = arch
        self.ksize = ksize
        self._describe_attention(attention)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels, steps = 64, zip(WIDTHS, layers, ksize or [None] * 4, strict=True)
        for i, (width, depth, k) in enumerate(steps):
            stage = Stage()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(in_channels, width, stride, attention, k))
                in_channels = channels[i]
            self.add_module(f"layer{i + 1}", stage)
        stages = [(c, 4 << i, f"layer{i + 1}") for i, c in enumerate(channels)]
        self._describe_classifier(num_classes, in_channels, [(64, 2, "relu"), *stages])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = self._last_layer()
        initialise_convolutions(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, 3, H, W) → (N, C, ⌈H/32⌉, ⌈W/32⌉), C = 512 or 2048."""
        if torch.jit.is_scripting():
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            x = self.maxpool(norm_act(self.conv1(x), self.bn1, self.relu, self.fused))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map → (N, num_classes), or with `pre_logits` (N, C), what `fc` takes."""
        if self.global_pool:
            x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.fc(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": blocks}

    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = norm_act(self.conv1(x), self.bn1, self.relu, self.fused)
        yield x
        x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            yield x


# depth: block, blocks in each stage, and the kernel sizes of the authors' released weights
DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int], str]] = {
    18: (BasicBlock, (2, 2, 2, 2), "3577"),
    34: (BasicBlock, (3, 4, 6, 3), "3357"),
    50: (Bottleneck, (3, 4, 6, 3), "3557"),
    101: (Bottleneck, (3, 4, 23, 3), "3357"),
    152: (Bottleneck, (3, 8, 36, 3), "3357"),
}


def _resnet(arch: str, ksize: Ksize, num_classes: int, attention: Kind) -> ResNet:
    block, layers, released = DEPTHS[int(arch.rpartition("resnet")[2])]
    attention = find_attention(attention)
    if ksize is None and attention is not None and attention.takes_ksize:
        ksize = released
    return ResNet(block, layers, attention, ksize, num_classes, arch)


# The constructors. Without `ksize`, ECA takes the released kernel sizes; another `attention` makes
# the same network with another attention in the same place, as the paper's ablation does.


def eca_resnet18(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "eca") -> ResNet:
    """ECA-ResNet-18."""
    return _resnet("eca_resnet18", ksize, num_classes, attention)


def eca_resnet34(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "eca") -> ResNet:
    """ECA-ResNet-34."""
    return _resnet("eca_resnet34", ksize, num_classes, attention)


def eca_resnet50(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "eca") -> ResNet:
    """ECA-ResNet-50."""
    return _resnet("eca_resnet50", ksize, num_classes, attention)


def eca_resnet101(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "eca") -> ResNet:
    """ECA-ResNet-101."""
    return _resnet("eca_resnet101", ksize, num_classes, attention)


def eca_resnet152(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "eca") -> ResNet:
    """ECA-ResNet-152."""
    return _resnet("eca_resnet152", ksize, num_classes, attention)


def se_resnet18(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "se") -> ResNet:
    """SE-ResNet-18."""
    return _resnet("se_resnet18", ksize, num_classes, attention)


def se_resnet34(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "se") -> ResNet:
    """SE-ResNet-34."""
    return _resnet("se_resnet34", ksize, num_classes, attention)


def se_resnet50(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "se") -> ResNet:
    """SE-ResNet-50."""
    return _resnet("se_resnet50", ksize, num_classes, attention)


def se_resnet101(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "se") -> ResNet:
    """SE-ResNet-101."""
    return _resnet("se_resnet101", ksize, num_classes, attention)


def se_resnet152(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "se") -> ResNet:
    """SE-ResNet-152."""
    return _resnet("se_resnet152", ksize, num_classes, attention)


def resnet18(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "none") -> ResNet:
    """ResNet-18."""
    return _resnet("resnet18", ksize, num_classes, attention)


def resnet34(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "none") -> ResNet:
    """ResNet-34."""
    return _resnet("resnet34", ksize, num_classes, attention)


def resnet50(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "none") -> ResNet:
    """ResNet-50."""
    return _resnet("resnet50", ksize, num_classes, attention)


def resnet101(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "none") -> ResNet:
    """ResNet-101."""
    return _resnet("resnet101", ksize, num_classes, attention)


def resnet152(ksize: Ksize = None, num_classes: int = 1000, attention: Kind = "none") -> ResNet:
    """ResNet-152."""
    return _resnet("resnet152", ksize, num_classes, attention)

"""MobileNetV2 with ECA, with the attentions it is compared with, and with none.

With attention off and width 1 the network computes what torchvision's computes, under the same
names. At other widths channels are int(c · width_mult), as in the authors' code, not rounded to 8.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import Attention, Kind, find_attention
from .classifier import (
    Classifier,
    Ksize,
    Stage,
    check_ksize,
    drop_branch,
    initialise_convolutions,
    recomputed,
)
from .eca_module import ADAPTIVE, adaptive_kernel_size
from .fused.block_tail import block_tail
from .fused.proof import is_bare

STEM, LAST = 32, 1280  # channels before the first stage and after the last
STAGES = (  # expansion ratio, output channels at width 1, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STAGE_OF_BLOCK = [i for i, (_, _, blocks, _) in enumerate(STAGES) for _ in range(blocks)]
NARROW = sum(channels < 96 for _, channels, _, _ in STAGES)  # stages that take k's first number
RELEASED_KSIZE = "13"


def expand_ksize(ksize: tuple[int, ...]) -> tuple[int, ...]:
    """Two kernel sizes (below 96 channels, from 96 up) → one for each of the seven stages."""
    if len(ksize) == 2:
        return ksize[:1] * NARROW + ksize[1:] * (len(STAGES) - NARROW)
    return ksize


def shorten_ksize(ksize: tuple[int, ...]) -> tuple[int, ...]:
    """The two numbers that stand for seven, where two do; else the seven."""
    short = (ksize[0], ksize[-1])
    return short if expand_ksize(short) == ksize else ksize


def _maps(channels: list[int]) -> Iterator[tuple[int, int, str]]:
    """Channels, reduction and module of the last block of each resolution."""
    reduction = 2  # the stem's
    for stage, (_, _, _, stride) in enumerate(STAGES):
        reduction *= stride
        if stage + 1 == len(STAGES) or STAGES[stage + 1][3] == 2:
            last = len(STAGE_OF_BLOCK) - STAGE_OF_BLOCK[::-1].index(stage)
            yield channels[stage], reduction, f"features.{last}"


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, padded to keep the size at stride 1; BatchNorm; ReLU6.

    (N, C, H, W) → (N, out_channels, H/stride, W/stride).
    """

    fused = True  # BatchNorm and ReLU6 as one operation wherever that is possible; `set_fused`

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ):
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel,
                stride,
                padding=kernel // 2,
                groups=groups,
                bias=False,
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU6(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript knows no `fused`
            if self.fused and len(self) == 3:  # somebody may have added a module
                return self._fast(x)
        for module in self:
            x = module(x)
        return x

    @torch.jit.unused
    def _fast(self, x: Tensor) -> Tensor:
        conv, bn, activation = self
        return block_tail(conv(x), bn, activation=activation)


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3 with the stride s, linear 1×1, attention; added to x if it fits.

    (N, C, H, W) → (N, out_channels, H/s, W/s). Attention is the last member of `conv` and stands in
    every block, with or without the addition.
    """

    fused = True  # the tail as one operation wherever that is possible; `set_fused` sets it
    drop_path = 0.0  # probability of an image to skip the block in training; `set_drop_path`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        attention: Attention | None,
        ksize: int | None,
    ):
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential()
        if expansion != 1:
            self.conv.append(ConvBNReLU(in_channels, hidden, 1))
        self.conv.append(ConvBNReLU(hidden, hidden, 3, stride, groups=hidden))
        self.conv.append(nn.Conv2d(hidden, out_channels, 1, bias=False))
        self.conv.append(nn.BatchNorm2d(out_channels))
        self.attends = attention is not None
        if attention:
            self.conv.append(attention.build(out_channels, ksize))

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return x + self.conv(x) if self.residual else self.conv(x)
        return self._fast(x)

    @torch.jit.unused
    def _fast(self, x: Tensor) -> Tensor:
        if self.residual and self.drop_path and self.training:
            return x + drop_branch(self._branch(x, None), self.drop_path)
        return self._branch(x, x if self.residual else None)

    def _branch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not self.fused or not is_bare(self.conv, nn.Sequential):
            z = self.conv(x)
            return z if residual is None else z + residual
        *body, bn, attention = self.conv if self.attends else (*self.conv, None)
        z = x
        for module in body:
            z = module(z)
        return block_tail(z, bn, attention, residual)


class MobileNetV2(Classifier):
    """MobileNetV2 with one attention layer a block.

    Args:
        attention: as `attention.find_attention` takes it.
        ksize: ECA's kernel sizes as `parse_ksize` reads them: two numbers, for the stages of fewer
            than 96 output channels and for the others; or seven, one a stage; or "adaptive", which
            applies eq. 12 to the stage's output channels. Widths here are those at `width_mult` 1
            for the two numbers, so that "13" means the same stages at any width, and the actual
            ones for eq. 12. Without ECA there is none to give.
        num_classes: rows of the classifier; 0 for none, see `Classifier`.
        width_mult: factor on the channels, at least 1/16.
        arch: the name kept in checkpoints.

    Attributes:
        ksize: the kernel sizes used: two numbers if two say it, else seven, or None.

    Shape: (N, 3, H, W) → (N, num_classes), or (N, num_features) without classes.
    """

    head = "classifier.1"

    def __init__(
        self,
        attention: Kind = "eca",
        ksize: Ksize = None,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        arch: str = "mobilenetv2",
    ):
        super().__init__()
        if not 1 / STAGES[0][1] <= width_mult < math.inf:  # below it a stage has no channels
            raise ValueError(f"width_mult must be at least 1/16, such as 0.5, not {width_mult}")
        channels = [int(c * width_mult) for _, c, _, _ in STAGES]
        attention = find_attention(attention)
        if ksize is None and attention is not None and attention.takes_ksize:
            ksize = RELEASED_KSIZE
        ksize = check_ksize(arch, attention, ksize, stages=(2, len(STAGES)))
        if ksize == ADAPTIVE:
            ksize = tuple(adaptive_kernel_size(c) for c in channels)
        if ksize:
            ksize = expand_ksize(ksize)
        self.arch = arch
        self._describe_attention(attention, width_mult=width_mult)
        self.ksize = shorten_ksize(ksize) if ksize else None
        last = int(LAST * max(1.0, width_mult))
        self._describe_classifier(num_classes, last, _maps(channels))

        in_channels = int(STEM * width_mult)
        self.features = Stage(ConvBNReLU(3, in_channels, 3, stride=2))
        for i, (expansion, _, blocks, stride) in enumerate(STAGES):
            k = ksize[i] if ksize else None
            for j in range(blocks):
                self.features.append(
                    InvertedResidual(
                        in_channels, channels[i], stride if j == 0 else 1, expansion, attention, k
                    )
                )
                in_channels = channels[i]
        self.features.append(ConvBNReLU(in_channels, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.25), self._last_layer())
        initialise_convolutions(self)
        self._initialise_last_layer()

    def _initialise_last_layer(self) -> None:
        if self.num_classes:
            linear = cast(nn.Linear, self.classifier[1])
            nn.init.normal_(linear.weight, 0, 0.01)
            nn.init.zeros_(linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, 3, H, W) → (N, C, ⌈H/32⌉, ⌈W/32⌉), C = 1280 up to width 1."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map → (N, num_classes), or with `pre_logits` (N, C) after dropout."""
        if self.global_pool:
            x = x.mean((2, 3))  # not a pooling module: the published FLOPs count it as nothing
        return self.classifier[0](x) if pre_logits else self.classifier(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        with_the_one_before = (99999,)  # timm's number for it: the last convolution is no block
        blocks = [(rf"^features\.{len(STAGE_OF_BLOCK) + 1}\.", with_the_one_before)]
        if not coarse:
            return {"stem": r"^features\.0\.", "blocks": [*blocks, (r"^features\.(\d+)\.", None)]}
        for stage in range(len(STAGES)):
            names = "|".join(str(i + 1) for i, s in enumerate(STAGE_OF_BLOCK) if s == stage)
            blocks.append((rf"^features\.(?:{names})\.", (stage,)))
        return {"stem": r"^features\.0\.", "blocks": blocks}

    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        ends = {int(info["module"].rpartition(".")[2]) for info in self.feature_info}
        for i, block in enumerate(self.features):
            x = recomputed(block, x) if self.features.recomputes(x) else block(x)
            if i in ends or i == len(self.features) - 1:
                yield x


def eca_mobilenetv2(
    ksize: Ksize = None,
    num_classes: int = 1000,
    attention: Kind = "eca",
    width_mult: float = 1.0,
) -> MobileNetV2:
    """ECA-MobileNetV2; see the class for the arguments."""
    return MobileNetV2(attention, ksize, num_classes, width_mult, "eca_mobilenetv2")


def se_mobilenetv2(
    ksize: Ksize = None,
    num_classes: int = 1000,
    attention: Kind = "se",
    width_mult: float = 1.0,
) -> MobileNetV2:
    """SE-MobileNetV2; see the class for the arguments."""
    return MobileNetV2(attention, ksize, num_classes, width_mult, "se_mobilenetv2")


def mobilenetv2(
    ksize: Ksize = None,
    num_classes: int = 1000,
    attention: Kind = "none",
    width_mult: float = 1.0,
) -> MobileNetV2:
    """MobileNetV2; see the class for the arguments."""
    return MobileNetV2(attention, ksize, num_classes, width_mult, "mobilenetv2")

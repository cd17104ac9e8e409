"""What ResNet and MobileNetV2 share: checks of their arguments, and initialisation."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from .attention import takes_ksize
from .eca_module import parse_ksize

Ksize = str | Sequence[int] | None


def check_num_classes(num_classes: int) -> int:
    """Returns `num_classes`; a ValueError if it is no integer of 0 (no last layer) or more."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(
            f"num_classes must be 1 or more, such as 1000, or 0 for no last layer,"
            f" not {num_classes!r}"
        )
    return num_classes


def check_ksize(
    arch: str, attention: str, ksize: Ksize, stages: int | tuple[int, ...]
) -> tuple[int, ...] | Literal["adaptive"] | None:
    """Returns what `parse_ksize` reads, or None for an attention without kernel sizes.

    Raises:
        ValueError: one line; a kernel size that will not do, or one where the attention has none.
    """
    if takes_ksize(attention):
        return parse_ksize(ksize, stages)
    if ksize is not None:
        raise ValueError(
            f"{arch} (attention {attention!r}) has no ECA layer: leave `ksize={ksize}` out"
        )
    return None


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def initialise_convolutions(network: nn.Module) -> None:
    """Initialises the 2-d convolutions in place: Kaiming normal, by fan-out.

    All else keeps torch's initialisation, as in the authors' code: ECA's 1-d convolution, and
    BatchNorm, which starts with weight 1 and bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

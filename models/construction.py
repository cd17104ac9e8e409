"""What the two families of networks share: checks of their arguments, and initialisation."""

from collections.abc import Sequence

from torch import nn

from .attention import takes_ksize
from .eca_module import parse_ksize

Ksize = str | Sequence[int] | None


def check_num_classes(num_classes: int) -> int:
    """`num_classes`, if it is an integer of 0 (no last layer) or more; else a ValueError."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(
            f"num_classes must be 1 or more, such as 1000, or 0 for no last layer,"
            f" not {num_classes!r}"
        )
    return num_classes


def check_ksize(
    arch: str, attention: str, ksize: Ksize, stages: int | tuple[int, ...]
) -> tuple[int, ...] | str | None:
    """`parse_ksize` for an attention that has kernels; None for one that has none."""
    if takes_ksize(attention):
        return parse_ksize(ksize, stages)
    if ksize is not None:
        raise ValueError(f"{arch} (attention {attention!r}) has no ECA layer: leave --ksize out")
    return None


def initialise_convolutions(network: nn.Module) -> None:
    """Kaiming normal by fan-out for the 2-d convolutions, in place.

    As published, it passes by ECA's 1-d convolution, which keeps torch's own initialisation, and
    BatchNorm, which torch starts at weight 1 and bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

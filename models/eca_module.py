"""Efficient Channel Attention: the layer, its adaptive kernel size, and the reading of `--ksize`.

Wang et al., ECA-Net, CVPR 2020, arXiv 1910.03151. This file needs only torch, so it can be copied
alone into another project:

    layer = ECALayer(adaptive_kernel_size(channels))
    y = layer(x)  # same shape as x, any of (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W)
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

ADAPTIVE: Literal["adaptive"] = "adaptive"

_EXAMPLES = {2: "13 or 1,3", 4: "3557 or 3,5,5,11"}


def _is_kernel_size(k: object) -> bool:
    """Odd kernels only: an even one has no middle, so its output would not line up with C."""
    return isinstance(k, Integral) and not isinstance(k, bool) and int(k) > 0 and int(k) % 2 == 1


class ECALayer(nn.Module):
    """Scales each channel by a gate computed from its own mean and its k - 1 neighbours' (eq. 9).

    y = mean of x over all positions, s = σ(conv1d_k(y)) along the channel axis, out = x · s.
    The k weights are shared by all channels; the ends of the channel axis are padded with zeros.

    Args:
        kernel_size: k, odd and positive; `adaptive_kernel_size` gives one from the channel count.

    Shape: (N, C, ...) with none to three spatial axes → the same shape and memory format.

    Raises:
        ValueError: for a kernel size that is not an odd positive integer, or an input of another
            rank.
    """

    def __init__(self, kernel_size: int = 3):
        super().__init__()
        if not _is_kernel_size(kernel_size):
            raise ValueError(
                f"kernel_size must be an odd positive integer such as 3, not {kernel_size!r}"
            )
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):
                return self._traced(x)
            if not 2 <= x.dim() <= 5:
                raise ValueError(
                    f"ECALayer takes (N, C) to (N, C, D, H, W), not shape {tuple(x.shape)}"
                )
        # Other ranks as (N, C, P, 1): a view, in channels_last formats too.
        y = x if x.dim() == 4 else x.unsqueeze(-1).unsqueeze(-1).flatten(2, -2)
        gate = torch.sigmoid(self.conv(self.avg_pool(y).flatten(1).unsqueeze(1)))
        return x * gate.reshape(list(x.shape[:2]) + [1] * (x.dim() - 2))

    def _traced(self, x: Tensor) -> Tensor:
        """The same without asking for the rank, which torch.fx does not know."""
        y = x.unsqueeze(-1).unsqueeze(-1).flatten(2, -2)
        gate = torch.sigmoid(self.conv(self.avg_pool(y).flatten(1).unsqueeze(1)))
        return (y * gate.transpose(1, 2).unsqueeze(-1)).reshape(x.shape)


def adaptive_kernel_size(channels: int, gamma: float = 2, b: float = 1) -> int:
    """The kernel size that the paper derives from the channel count (eq. 12).

    k = |log2(C)/γ + b/γ|odd, as the authors compute it: the integer part, and one more if that is
    even. 64 → 3, 128 to 1024 → 5, 2048 → 7.
    """
    if channels < 1 or gamma <= 0:
        raise ValueError(
            f"channels must be at least 1 and gamma above 0 (as in 64, 2), not {channels}, {gamma}"
        )
    t = int(abs((math.log2(channels) + b) / gamma))
    return t if t % 2 else t + 1


def parse_ksize(
    ksize: str | Sequence[int] | None, stages: int | tuple[int, ...] = 4
) -> tuple[int, ...] | Literal["adaptive"]:
    """Reads kernel sizes, one a stage, as the command line or a caller gives them.

    Args:
        ksize: `3557` (one digit a stage), `3,5,5,11`, `adaptive`, or a sequence of integers.
        stages: how many sizes there must be, or the counts that will do.

    Returns:
        A tuple of odd integers, or "adaptive": then it is for the network to apply
        `adaptive_kernel_size` to the channels that each of its layers sees.

    Raises:
        ValueError: one line that shows a valid example.
    """
    sizes: list[Any]
    counts = (stages,) if isinstance(stages, int) else stages
    if isinstance(ksize, str):
        text = ksize.strip()
        if text == ADAPTIVE:
            return ADAPTIVE
        words = [word.strip() for word in text.split(",")] if "," in text else list(text)
        sizes = [int(word) if word.isascii() and word.isdigit() else None for word in words]
    else:
        sizes = list(ksize) if isinstance(ksize, Sequence) else []
    if len(sizes) not in counts or not all(map(_is_kernel_size, sizes)):
        example = _EXAMPLES.get(counts[0], "3" * counts[0])
        raise ValueError(
            f"ksize {ksize!r} is not {' or '.join(map(str, counts))} odd kernel sizes:"
            f" write for example {example}, or {ADAPTIVE}"
        )
    return tuple(int(k) for k in sizes)

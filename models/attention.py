"""The channel attentions that the paper compares ECA with (Table 2), and the table of them all.

Each takes (N, C, H, W) and gives the same shape: x · σ(f(y)), where y is the mean over H × W. They
differ in f only. Pooling, convolution and linear maps are modules, so that FLOPs counters see them.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.eca_module import ECALayer


class ECANSLayer(nn.Module):
    """ECA without sharing (ECA-NS, eq. 7): each channel has k weights of its own, k·C in all.

    A channel's window of k neighbouring means becomes the k inputs of that channel's group in a
    grouped convolution of one output. `conv.weight` is (C, 1, k).
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (k,) = self.conv.kernel_size
        y = F.pad(self.avg_pool(x).flatten(1), (k // 2, k // 2))
        return x * torch.sigmoid(self.conv(y.unfold(1, k, 1))).unsqueeze(-1)


class SELayer(nn.Module):
    """Squeeze and excitation (eq. 2): f(y) = W2 ReLU(W1 y), with C/reduction hidden units, no bias.

    Over 2^20 the parameters come out as published for the SE-ResNets: 11.23M, 20.93M, 26.77M,
    47.01M, 63.68M (18 to 152). SE-MobileNetV2 comes out as 3.37M where the paper prints 3.40M;
    a reduction of 8 would give 3.40M.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc(self.avg_pool(x).flatten(1)))
        return x * gate[:, :, None, None]


class SEVar1Layer(nn.Module):
    """SE-Var1: f(y) = y, no parameters."""

    def __init__(self):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.avg_pool(x))


class SEVar2Layer(nn.Module):
    """SE-Var2: f(y) = w ⊙ y, one weight a channel, which starts at 1 (the paper does not say)."""

    def __init__(self, channels: int):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.avg_pool(x) * self.weight[:, None, None])


class SEVar3Layer(nn.Module):
    """SE-Var3: f(y) = W y with a full C × C matrix: every channel sees every other."""

    def __init__(self, channels: int):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc(self.avg_pool(x).flatten(1)))
        return x * gate[:, :, None, None]


class Attention(NamedTuple):
    slot: str  # the attribute of a ResNet block that holds the layer, so a part of its keys
    takes_ksize: bool
    build: Callable[[int, int | None], nn.Module]  # (channels, kernel size) → layer


ATTENTIONS: dict[str, Attention | None] = {
    "none": None,
    "eca": Attention("eca", True, lambda channels, k: ECALayer(k)),
    "eca_ns": Attention("eca", True, ECANSLayer),
    "se": Attention("se", False, lambda channels, k: SELayer(channels)),
    "se_var1": Attention("se", False, lambda channels, k: SEVar1Layer()),
    "se_var2": Attention("se", False, lambda channels, k: SEVar2Layer(channels)),
    "se_var3": Attention("se", False, lambda channels, k: SEVar3Layer(channels)),
}


def find_attention(name: str) -> Attention | None:
    """The entry of `ATTENTIONS`; a ValueError with the nearest names for an unknown one."""
    if name not in ATTENTIONS:
        close = difflib.get_close_matches(str(name), ATTENTIONS) or ATTENTIONS
        raise ValueError(f"unknown attention {name!r}: use one of {', '.join(close)}")
    return ATTENTIONS[name]


def takes_ksize(name: str) -> bool:
    entry = find_attention(name)
    return entry is not None and entry.takes_ksize

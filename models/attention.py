"""The channel attentions of the paper's Table 2, and a table of all attentions by name.

Each computes x · σ(f(y)) for x of shape (N, C, H, W); y is the mean over H × W. They differ in f
alone. Pooling, convolution and linear maps are modules, so that FLOPs counters see them.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .eca_module import ECALayer


class _Gate(nn.Module):
    """Computes x · σ(f(y)); each subclass defines `f`, (N, C) → (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)

    def f(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.f(self.avg_pool(x).flatten(1)))
        return x * gate[:, :, None, None]


class ECANSLayer(_Gate):
    """ECA without sharing (ECA-NS, eq. 7): each channel has k weights of its own, k·C in all.

    A channel's window of k neighbouring means becomes the k inputs of that channel's group in a
    grouped convolution of one output. `conv.weight` is (C, 1, k).
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)

    def f(self, y: Tensor) -> Tensor:
        (k,) = self.conv.kernel_size
        windows = F.pad(y, (k // 2, k // 2)).unfold(1, k, 1)
        return self.conv(windows).squeeze(2)


class SELayer(_Gate):
    """Squeeze and excitation (eq. 2): f(y) = W2 ReLU(W1 y), C/reduction hidden units, no biases.

    With M = 2^20, SE-ResNet-18, 50, 101 and 152 then have the parameters that the paper prints:
    11.23M, 26.77M, 47.01M and 63.68M. Two differ. SE-ResNet-34 has 20.94M (paper: 20.93M), and
    SE-MobileNetV2 has 3.37M (paper: 3.40M, the number for a reduction of 8).
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
        )

    def f(self, y: Tensor) -> Tensor:
        return self.fc(y)


class SEVar1Layer(_Gate):
    """SE-Var1: f(y) = y, no parameters."""

    def f(self, y: Tensor) -> Tensor:
        return y


class SEVar2Layer(_Gate):
    """SE-Var2: f(y) = w ⊙ y, one weight per channel, 1 at the start (the paper names no value)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def f(self, y: Tensor) -> Tensor:
        return y * self.weight.to(y.dtype)  # or autocast's bf16 would turn to fp32 from here on


class SEVar3Layer(_Gate):
    """SE-Var3: f(y) = W y with a full C × C matrix: every channel sees every other."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, channels, bias=False)

    def f(self, y: Tensor) -> Tensor:
        return self.fc(y)


class Attention(NamedTuple):
    slot: str  # the attribute of a ResNet block that holds the layer, so a part of its keys
    takes_ksize: bool
    build: Callable[[int, Any], nn.Module]  # (channels, kernel size or None) → layer


ATTENTIONS: dict[str, Attention | None] = {
    "none": None,
    "eca": Attention("eca", True, lambda channels, k: ECALayer(k)),
    "eca_ns": Attention("eca", True, ECANSLayer),
    "se": Attention("se", False, lambda channels, k: SELayer(channels)),
    "se_var1": Attention("se", False, lambda channels, k: SEVar1Layer()),
    "se_var2": Attention("se", False, lambda channels, k: SEVar2Layer(channels)),
    "se_var3": Attention("se", False, lambda channels, k: SEVar3Layer(channels)),
}


def attention_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters of a network's attention layers, by their names in its state dict."""
    return {
        f"{name}.{parameter}": value
        for name, module in network.named_modules()
        if isinstance(module, ECALayer | _Gate)
        for parameter, value in module.state_dict().items()
    }


def find_attention(name: str) -> Attention | None:
    """Returns the entry of `ATTENTIONS`.

    Raises:
        ValueError: the name is unknown; the line shows the nearest names.
    """
    if name not in ATTENTIONS:
        close = difflib.get_close_matches(str(name), ATTENTIONS) or ATTENTIONS
        raise ValueError(f"unknown attention {name!r}: use one of {', '.join(close)}")
    return ATTENTIONS[name]


def takes_ksize(name: str) -> bool:
    """Tells whether the attention has a kernel size, which `ksize` then sets."""
    entry = find_attention(name)
    return entry is not None and entry.takes_ksize

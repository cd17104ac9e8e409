"""The channel attentions of the paper's Table 2, and every attention by its name: timm's and a
user's own, too.

Each computes x · σ(f(y)) for x of shape (N, C, H, W); y is the mean over H × W. They differ in f
alone. Pooling, convolution and linear maps are modules, so that FLOPs counters see them.
"""

import difflib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

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
    """An attention as networks are built with it.

    Attributes:
        name: as `--attention` takes it and a checkpoint names it.
        slot: the attribute of a ResNet block that holds the layer, so a part of its keys.
        takes_ksize: the layer has a kernel size, which `ksize` then sets.
        build: (channels, kernel size or None) → layer.
        sha256: of the file that holds a user's own layer; None for a layer of a library.
    """

    name: str
    slot: str
    takes_ksize: bool
    build: Callable[[int, Any], nn.Module]
    sha256: str | None = None


_KNOWN = (
    Attention("eca", "eca", True, lambda channels, k: ECALayer(k)),
    Attention("eca_ns", "eca", True, ECANSLayer),
    Attention("se", "se", False, lambda channels, k: SELayer(channels)),
    Attention("se_var1", "se", False, lambda channels, k: SEVar1Layer()),
    Attention("se_var2", "se", False, lambda channels, k: SEVar2Layer(channels)),
    Attention("se_var3", "se", False, lambda channels, k: SEVar3Layer(channels)),
)
ATTENTIONS: dict[str, Attention | None] = {"none": None, **{each.name: each for each in _KNOWN}}
OTHER_SLOT = "attention"  # of the layers of timm and of users
TIMM = "timm:"
KSIZE_NAMES = ("k", "ksize", "k_size", "kernel_size")  # under which a user's layer may take k

Kind = str | type[nn.Module] | Attention | None  # what names an attention


def find_attention(kind: Kind) -> Attention | None:
    """Returns the attention of a name or class; None for "none". Runs no file.

    Args:
        kind: a key of `ATTENTIONS`; "timm:" and the name of one of timm's attention layers; a class
            whose instances are built with the channels, and the kernel size if they take one; or
            what this function has returned.

    Raises:
        ValueError: one line; the name is unknown, or such a layer does not keep (N, C, H, W).
    """
    if kind is None or isinstance(kind, Attention):
        return kind
    if isinstance(kind, type):
        return _of_class(kind)
    if kind.startswith(TIMM):
        return _of_timm(kind)
    if is_file(kind):
        raise ValueError(
            f"the attention {kind} is in a user's file, which is run only where it is typed: give"
            f" --attention {kind}, or in Python the class itself"
        )
    if kind not in ATTENTIONS:
        close = difflib.get_close_matches(kind, ATTENTIONS) or ATTENTIONS
        raise ValueError(
            f"unknown attention {kind!r}: use one of {', '.join(close)}, timm:NAME or FILE.py:CLASS"
        )
    return ATTENTIONS[kind]


def is_file(name: str) -> bool:
    """Tells whether a name is that of a class in a file: `FILE.py:CLASS`."""
    return name.rpartition(":")[0].endswith(".py")


def typed_attention(name: str | None) -> Kind:
    """Returns what a user has typed for --attention: the class of FILE.py:CLASS, else the name.

    Only this function runs the file.

    Raises:
        ValueError: one line; no such file or class, or the file fails.
    """
    if name is None or not is_file(name):
        return name
    file, _, kind = name.rpartition(":")
    path = Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"attention {name}: no file {file}; give FILE.py:CLASS")
    module_name = f"{path}:{_sha256(path)}"  # a changed file is another module
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's code may raise anything
            del sys.modules[module_name]
            raise ValueError(f"attention {name}: {file} fails: {_first_line(error)}") from None
    layer = getattr(sys.modules[module_name], kind, None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(f"attention {name}: {file} has no class {kind} of torch.nn.Module")
    return layer


def _of_class(kind: type[nn.Module]) -> Attention:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    path = Path(file) if file else None
    name = f"{path.name if path else 'session.py'}:{kind.__name__}"
    parameters = inspect.signature(kind).parameters
    keyword = next((k for k in KSIZE_NAMES if k in parameters), None)

    def build(channels: int, k: int | None) -> nn.Module:
        return kind(channels, **({keyword: k} if keyword else {}))

    sha256 = _sha256(path) if path else ""
    return _tried(Attention(name, OTHER_SLOT, keyword is not None, build, sha256))


def _of_timm(name: str) -> Attention:
    try:
        from timm.layers.create_attn import create_attn
    except ImportError:
        raise ValueError(f"attention {name} needs timm: pip install timm") from None
    kind = name.removeprefix(TIMM)

    def build(channels: int, k: int | None) -> nn.Module:
        return cast(nn.Module, create_attn(kind, channels))  # type: ignore[no-untyped-call]

    return _tried(Attention(name, OTHER_SLOT, False, build))


def _tried(attention: Attention) -> Attention:
    """Returns it if a layer of it keeps the shape of (N, C, H, W), whatever H and W are."""
    x = torch.zeros(2, 64, 7, 9, device="cpu")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            layer = attention.build(64, 3 if attention.takes_ksize else None).eval()
            shape = tuple(layer(x).shape)
    except Exception as error:  # another's code may raise anything
        reason = f"cannot be built with channels alone: {_first_line(error)}"
    else:
        if shape == tuple(x.shape):
            return attention
        reason = f"makes {shape} of {tuple(x.shape)}, and must keep the shape"
    raise ValueError(f"attention {attention.name} {reason}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

"""Tells whether a module still computes the formula that a fast path computes in its place.

A fast path reads a module's weights and does not call the module. That is right only if a call
would compute the formula: users change layers, add hooks, patch methods, or edit the source.
"""

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..eca_module import ECALayer

_M = TypeVar("_M", bound=nn.Module)
_KINDS: tuple[type[nn.Module], ...] = (
    ECALayer,
    nn.AdaptiveAvgPool2d,
    nn.BatchNorm2d,
    nn.Conv1d,
    nn.Conv2d,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.Sequential,
    nn.SyncBatchNorm,
)
# As they were when this file was imported: a method that is patched later is another one.
_FORWARDS: dict[type[nn.Module], object] = {kind: kind.forward for kind in _KINDS}
_CALL = nn.Module.__call__
_CONVOLVE: dict[type[nn.Module], object] = {
    kind: kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d)
}
_CHECKS = nn.BatchNorm2d._check_input_dim


def remember(*kinds: type[nn.Module]) -> None:
    """Records the present forward of further classes as their original one."""
    _FORWARDS.update({kind: kind.forward for kind in kinds})


# Before 2.14, compiled code that saw no hook is not compiled again when one is added.
_HOOKS_UNWATCHED = torch.__version__ < "2.14"


def _watch_hooks() -> bool:
    """Lets torch.compile check for hooks at each call; it runs this while it traces the code."""
    import torch._dynamo.config

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return True


# What torch.compiler.assume_constant_result does, without importing the compiler for it.
_watch_hooks._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_hooks(module: nn.Module) -> bool:
    """Tells whether calling the module runs hooks."""
    if _HOOKS_UNWATCHED and torch.compiler.is_compiling():
        _watch_hooks()
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_bare(module: object, kind: type[_M]) -> TypeGuard[_M]:
    """Tells whether calling the module runs the original forward of `kind` and nothing else."""
    if not isinstance(module, kind):
        return False
    own: Any = type(module)  # with what `kind` has beyond nn.Module
    if own.forward is not _FORWARDS[kind] or own.__call__ is not _CALL:
        return False
    if kind in _CONVOLVE and (
        own._conv_forward is not _CONVOLVE[kind] or "_conv_forward" in module.__dict__
    ):
        return False
    if kind is nn.BatchNorm2d and own._check_input_dim is not _CHECKS:
        return False
    return not has_hooks(module) and "forward" not in module.__dict__


def is_channel_convolution(conv: nn.Conv1d) -> bool:
    """Tells whether a bare Conv1d is the convolution of eq. 9: one kernel, odd, padded by zeros."""
    *others, size = conv.weight.shape
    return (
        others == [1, 1]
        and conv.bias is None
        and size % 2 == 1
        and conv.stride == (1,)
        and conv.dilation == (1,)
        and conv.groups == 1
        and conv.padding == (size // 2,)
        and conv.padding_mode == "zeros"
    )


def is_eca(attention: object) -> TypeGuard[ECALayer]:
    """Tells whether calling the module computes x · σ(conv1d(mean of x)), with its own kernel."""
    if not ORIGINAL_ECA or not is_bare(attention, ECALayer):
        return False
    pool, conv = getattr(attention, "avg_pool", None), getattr(attention, "conv", None)
    return (
        is_bare(pool, nn.AdaptiveAvgPool2d)
        and pool.output_size in (1, (1, 1))
        and is_bare(conv, nn.Conv1d)
        and is_channel_convolution(conv)
    )


@torch.no_grad()
def _computes_the_formula(layer: nn.Module, kernel: Tensor) -> bool:
    """Tries whether an ECA layer computes the formula: its source may have been edited."""
    x = torch.arange(60.0, dtype=torch.float64, device="cpu").sub(31).div(17).reshape(2, 5, 2, 3)
    pooled = nn.functional.pad(x.mean((2, 3)), (1, 1))
    first, second, third = (kernel[j] * pooled[:, j : j + 5] for j in range(3))
    gate = (first + second + third).sigmoid()
    try:
        found = layer(x)
    except Exception:  # whatever an edited layer raises, the formula is not for it
        return False
    expected = x * gate[:, :, None, None]
    return found.shape == x.shape and bool((found - expected).abs().max() < 1e-12)


def _try_eca() -> bool:
    kernel = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device="cpu")
    with torch.random.fork_rng(devices=[]):  # on "meta" it took torch 0.3 s to get ready
        layer = ECALayer(3).double()
    try:
        layer.load_state_dict({"conv.weight": kernel.reshape(1, 1, 3)})
    except RuntimeError:  # other parameters than ours
        return False
    return _computes_the_formula(layer, kernel)


ORIGINAL_ECA = _try_eca()

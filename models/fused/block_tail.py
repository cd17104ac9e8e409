"""BatchNorm + ECA + residual addition + ReLU as one operation of two passes each way.

Module by module, the end of a block reads and writes its (N, C, H, W) tensor a dozen times. But
BatchNorm is affine per channel and pooling is linear, so ECA's pooled input follows from the means
of z that BatchNorm computes anyway: mean over pixels of BN(z) = a · mean of z + b. With that,

    forward   1. moments of z → a, b and the gate s, all (N, C) or smaller
              2. out = ReLU(z · a·s + b·s + residual)
    backward  1. d = ∂out where out > 0, Σd and Σd·(z - mean) → every small gradient
              2. ∂residual = d, ∂z = a·s · d + (two terms that are affine in z)

Only z and out are kept for backward, which the convolutions on either side keep too.

The same operation without ECA, residual or ReLU serves the other networks. `block_tail` is what the
blocks call: it takes this path where `can_fuse` allows it, else the modules one by one.

Where PyTorch finds a CUDA device, Triton is imported and its kernels compute the passes; where the
import fails the reason is kept. On a CPU `cpu_passes` does; compiled code has `formulas`.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..eca_module import ECALayer
from . import cpu_passes, formulas
from .cpu_passes import (
    Gradients,
    Kept,
    Wanted,
    accumulation_dtype,
    format_of,
    refuse_second_derivative,
)
from .proof import is_bare, is_eca

eca_triton: ModuleType | None = None
_not_imported = "PyTorch finds no CUDA device"
# Where there is none, Triton's import would only cost time. Not is_available(): that initialises
# the driver, after which no forked child can use CUDA.
if torch.cuda.device_count():
    try:
        from . import triton_tail

        eca_triton = triton_tail
    except Exception as error:  # also of a Triton that does not fit this PyTorch
        _not_imported = f"Triton cannot be imported: {error}"


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Returns None if Triton kernels take tensors of `dtype` on `device`, otherwise the reason."""
    if device.type != "cuda":
        return "they are for CUDA devices"
    if eca_triton is None:
        return _not_imported
    if dtype not in eca_triton.DTYPES:
        return f"there are none for {dtype}"
    from .triton_trial import why_not

    return why_not(device, dtype)


def on_triton(z: Tensor) -> bool:
    return z.is_cuda and why_not_triton(z.device, z.dtype) is None


def _forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Kept]:
    """Computes `formulas.tail_forward` by what serves z best."""
    if not on_triton(z):
        return formulas.tail_forward(z, weight, bias, kernel, residual, statistics, eps, ceiling)
    assert eca_triton is not None
    mean, variance = statistics or (None, None)
    out, *batch, inverse_std, pooled, gate = eca_triton.tail_forward(
        z, weight, bias, kernel, residual, mean, variance, eps, ceiling
    )
    mean, variance = statistics or batch
    return out, variance, Kept(mean, inverse_std, pooled, gate)


def _backward(
    grad: Tensor,
    z: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    kept: Kept,
    batch_statistics: bool,
    wanted: Wanted,
    ceiling: float | None,
) -> Gradients:
    """Computes `formulas.tail_backward` by what serves z best; grad and z have one format."""
    if not on_triton(z):
        return formulas.tail_backward(
            grad, z, out, weight, bias, kernel, kept, batch_statistics, wanted, ceiling
        )
    assert eca_triton is not None
    dz, d_weight, d_bias, d_kernel, d = eca_triton.tail_backward(
        grad,
        z,
        out,
        weight,
        bias,
        kernel,
        *kept,
        batch_statistics,
        wanted.z,
        wanted.residual,
        ceiling,
    )
    gradients = (dz, d_weight, d_bias, d_kernel, grad if out is None else d)
    return Gradients(*(g if want else None for g, want in zip(gradients, wanted, strict=True)))


def _widened(small: Tensor, z: Tensor) -> Tensor:
    """Returns `small`, dense, in the dtype in which sums over z are accumulated.

    Dense, as the kernels walk from one channel to the next: a parameter may be a strided view.
    """
    return small.to(accumulation_dtype(z.dtype)).contiguous()


class _FusedTail(torch.autograd.Function):
    """(z, weight, bias, kernel, residual) → out, and the mean and unbiased variance of the batch.

    The last two are None if `statistics` are given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        kernel: Tensor | None,
        residual: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        eps: float,
        ceiling: float | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        w, b = _widened(weight, z), _widened(bias, z)
        k = None if kernel is None else _widened(kernel, z)
        out, variance, kept = _forward(z, w, b, k, residual, statistics, eps, ceiling)
        activated = out if ceiling is not None else None
        ctx.save_for_backward(z, activated, weight, bias, kernel, *kept)
        ctx.ceiling = ceiling
        ctx.batch_statistics = statistics is None
        ctx.memory_format = format_of(z)  # backward must not ask: Dynamo does not know it there
        if statistics is not None:
            return out, None, None
        ctx.mark_non_differentiable(kept.mean, variance)
        return out, kept.mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        z, out, weight, bias, kernel, *kept = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:5])
        refuse_second_derivative()
        w, b = _widened(weight, z), _widened(bias, z)
        k = None if kernel is None else _widened(kernel, z)
        grad = grad.contiguous(memory_format=ctx.memory_format)
        gradients = _backward(
            grad, z, out, w, b, k, Kept(*kept), ctx.batch_statistics, wanted, ctx.ceiling
        )
        like = (z, weight, bias, kernel, grad)
        of_dtype = [g if g is None else g.to(t.dtype) for g, t in zip(gradients, like, strict=True)]
        return *of_dtype, None, None, None


def fused_tail(
    z: Tensor,
    bn: nn.BatchNorm2d,
    attention: ECALayer | None = None,
    residual: Tensor | None = None,
    ceiling: float | None = math.inf,
) -> Tensor:
    """Computes act(attention(bn(z)) + residual), and updates bn's running statistics as bn does.

    Args:
        z: (N, C, H, W), the last convolution's output. Half precision is accumulated in float32.
        bn: in training mode, or if it has no running statistics, those of the batch are used.
        residual: shape and dtype of z.
        ceiling: of the activation: infinity for ReLU, 6 for ReLU6, None for no activation.

    Returns:
        (N, C, H, W) in z's dtype and memory format.

    Call `can_fuse` first: this function does not check the conditions that it names.
    """
    memory_format = format_of(z)
    z = z.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    kernel = None if attention is None else attention.conv.weight
    if cpu_passes.serves(z):
        return cpu_passes.tail(z, bn, kernel, residual, ceiling)
    batch_statistics = bn.training or bn.running_mean is None
    statistics = None
    if not batch_statistics and bn.running_mean is not None and bn.running_var is not None:
        # A copy of the mean, which backward needs: a step in training mode may come before that.
        mean = bn.running_mean.to(accumulation_dtype(z.dtype), copy=True)
        statistics = (mean, _widened(bn.running_var, z))
    out, mean, variance = _FusedTail.apply(
        z,
        bn.weight,
        bn.bias,
        None if kernel is None else kernel.flatten(),
        residual,
        statistics,
        bn.eps,
        ceiling,
    )
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        _update_running_statistics(bn, mean, variance)
    return out


def _update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    """Updates bn's statistics as nn.BatchNorm2d does; momentum None averages over all batches."""
    momentum, batches = bn.momentum, bn.num_batches_tracked
    running: list[Any] = [bn.running_mean, bn.running_var]
    if momentum is None and batches is None:
        return
    with torch.no_grad():
        if batches is not None:
            batches.add_(1)
        share: Any = momentum
        if momentum is None and batches is not None:
            share = [batches.to(running[0].dtype).reciprocal()] * 2
        found = [new.to(old.dtype) for old, new in zip(running, (mean, unbiased), strict=True)]
        torch._foreach_lerp_(running, found, share)  # on a GPU one launch


def _transformed() -> bool:
    """Tells whether torch.func or forward-mode differentiation is active; the tail has neither."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def can_fuse(
    z: Tensor,
    bn: nn.Module,
    attention: nn.Module | None = None,
    residual: Tensor | None = None,
    activation: nn.Module | None = None,
) -> bool:
    """Tells whether `fused_tail` may replace activation(attention(bn(z)) + residual).

    It may if `_is_usual` agrees and the code is compiled or there are passes for z: not on a CPU
    without a C++ compiler, nor in a dtype that the passes do not take.
    """
    usual = _is_usual(z, bn, attention, residual, activation)
    return usual and (torch.compiler.is_compiling() or _has_passes(z))


def ceiling_of(activation: nn.Module | None) -> float | None:
    """Returns the largest value that an activation lets through, as `fused_tail` takes it."""
    if activation is None:
        return None
    return activation.max_val if isinstance(activation, nn.ReLU6) else math.inf


def _has_passes(z: Tensor) -> bool:
    """Tells whether there are compiled passes for z; `meta` has them, to show what is saved."""
    return z.device.type == "meta" or cpu_passes.serves(z) or on_triton(z)


def _is_usual(
    z: Tensor,
    bn: nn.Module,
    attention: nn.Module | None,
    residual: Tensor | None,
    activation: nn.Module | None,
) -> bool:
    """Tells whether the modules compute the formula, and no one looks on while they do.

    False, and the modules are called one by one, for: other modules than BatchNorm2d, ECALayer,
    ReLU and ReLU6, or with another forward than theirs (SyncBatchNorm); an ECALayer whose pooling
    or convolution was changed (`proof.is_eca`); BatchNorm without affine parameters; hooks on a
    module, as FLOPs counters attach them; tracing and export; torch.func's
    transforms and forward-mode differentiation; a residual that broadcasts, or of another dtype; a
    batch of one value a channel; parameters of other channels; anything on another device.
    """
    if not is_bare(bn, nn.BatchNorm2d):
        return False
    if isinstance(activation, nn.ReLU6):
        limits = (activation.min_val, activation.max_val)  # attributes that can be changed
        if not is_bare(activation, nn.ReLU6) or limits != (0.0, 6.0):
            return False
    elif activation is not None and not is_bare(activation, nn.ReLU):
        return False
    weight = bn.weight
    if weight is None or bn.bias is None:
        return False
    if attention is not None and not is_eca(attention):
        return False
    every_module = nn.modules.module
    if (
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return False
    if isinstance(z, torch.fx.Proxy):
        return False
    tracing = torch.jit.is_tracing()
    if tracing or torch.compiler.is_exporting() or _transformed():
        return False
    if z.dim() != 4 or not z.is_floating_point() or z.numel() <= z.shape[1]:
        return False
    if z.shape[1] != weight.shape[0] or z.device != weight.device:
        return False  # the modules say so; our passes would read elsewhere
    return residual is None or (
        residual.shape == z.shape and residual.dtype == z.dtype and residual.device == z.device
    )


listener: Callable[..., None] | None = None  # is told of each tail: see `tail_speed`


def block_tail(
    z: Tensor,
    bn: nn.Module,
    attention: nn.Module | None = None,
    residual: Tensor | None = None,
    activation: nn.Module | None = None,
    fused: bool = True,
) -> Tensor:
    """Computes activation(attention(bn(z)) + residual).

    It is one operation if `fused` is set, `can_fuse` agrees and `_pays` says that it is faster;
    otherwise module by module.
    """
    if listener is not None:
        listener(z, bn, attention, residual, activation)
    compiling = torch.compiler.is_compiling()
    alone = attention is None and residual is None
    # Asked before `_is_usual`, which takes longer: a network has many small BatchNorms. A compiler
    # does the same itself.
    if fused and alone and not torch.jit.is_tracing():
        fused = not compiling and _pays(z, attends=False)
    if fused and _is_usual(z, bn, attention, residual, activation):
        faster = alone or compiling or _pays(z, attention is not None)
        # DataParallel's threads share one interpreter: eight took 16 tails 17 times as long.
        if faster and not (z.is_cuda and getattr(bn, "_is_replica", False)):
            # `_is_usual` has said that they are of these classes.
            norm, eca = cast(nn.BatchNorm2d, bn), cast("ECALayer | None", attention)
            return fused_tail(z, norm, eca, residual, ceiling_of(activation))
        six = isinstance(activation, nn.ReLU6)
        if attention is None and residual is not None and z.device.type == "cpu" and not six:
            return _plain_tail(z, bn, residual, activation is not None)
    y = bn(z)
    if attention is not None:
        y = attention(y)
    if residual is not None:
        y = y + residual
    return y if activation is None else activation(y)


def norm_act(z: Tensor, bn: nn.Module, activation: nn.Module, fused: bool = True) -> Tensor:
    """Computes activation(bn(z)) in fewer passes over memory, where that is faster."""
    return block_tail(z, bn, None, None, activation, fused)


# Elements from which our passes beat PyTorch's own kernels, whose price is vectors of N·C numbers
# and calls: (with ECA, without). From processor times for the CPU (benchmarks/tail.py --table
# measures the choice), estimated for CUDA.
LARGE = {"cpu": (0, 1 << 17), "cuda": (1 << 23, 1 << 24), "meta": (0, 0)}
HALF_NCHW = 1 << 20  # without ECA in bfloat16: short rows of each channel convert slowly
FEW_PIXELS = 4  # so many in NHWC leave BatchNorm's own kernel, which sums over N, too, in front


def _pays(z: Tensor, attends: bool) -> bool:
    """Tells whether there are passes for z and they are faster; by its shape and dtype alone."""
    least = LARGE.get(z.device.type)
    if least is None or z.numel() < least[not attends] or not _has_passes(z):
        return False
    if attends or z.device.type != "cpu":
        return True
    if format_of(z) == torch.channels_last:
        return z.shape[2:].numel() > FEW_PIXELS
    return z.dtype is not torch.bfloat16 or z.numel() >= HALF_NCHW


def _plain_tail(z: Tensor, bn: nn.Module, residual: Tensor, activation: bool) -> Tensor:
    """Calls BatchNorm and does the rest in place: the fastest for small tensors on an eager CPU.

    It keeps the same tensors as `fused_tail`. In-place operations are safe here: no hook sees y.
    """
    y = bn(z).add_(residual)
    return y.relu_() if activation else y


def set_fused(network: nn.Module, fused: bool) -> int:
    """Sets `fused` on every block and network that has this switch; returns how many have it."""
    found = [module for module in network.modules() if hasattr(module, "fused")]
    for module in found:
        module.fused = bool(fused)  # type: ignore[assignment]
    return len(found)


def describe_tails(
    network: nn.Module,
    device: torch.device,
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    sync_bn: bool = False,
) -> str:
    """Describes for a report, in a few words, how `network`'s block tails will run on `device`.

    Args:
        fused: the value that `set_fused` gets.
        dtype: the dtype of the activations.
        compiled: the network will run under torch.compile.
        sync_bn: the BatchNorms will become SyncBatchNorm.
    """
    if not any(hasattr(type(module), "fused") for module in network.modules()):
        return "blocks as their library wrote them, module by module"
    attentions = (getattr(module, "attention", None) for module in network.modules())
    named = {name for name in attentions if isinstance(name, str)}
    others = ", ".join(sorted(named - {"eca", "none"}))
    sync_bn = sync_bn or any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())
    on_cuda = device.type == "cuda"
    no_triton = why_not_triton(device, dtype) if on_cuda else None
    obstacles: tuple[tuple[object, str], ...] = (
        (not fused, ""),
        (sync_bn, " (SyncBatchNorm)"),
        (others, f" (attention {others})"),
        (no_triton and not compiled, f" ({no_triton})"),
        (device.type not in ("cpu", "cuda") and not compiled, f" (no kernels for {device.type})"),
    )
    for stands, why in obstacles:
        if stands:
            return f"block tails module by module{why}"
    if device.type == "cpu" and not compiled:
        no_native = cpu_passes.why_not(dtype)
        if no_native and named == {"none"}:
            return f"block tails by BatchNorm's own kernel, the rest in place ({no_native})"
        if no_native:
            return f"block tails module by module ({no_native})"
        if named == {"none"}:
            return "fused block tails, small ones by BatchNorm's own kernel"
    compared = on_cuda and no_triton is None
    return f"fused block tails{' (Triton, compared on this GPU)' if compared else ''}"

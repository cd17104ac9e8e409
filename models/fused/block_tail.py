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
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..eca_module import ECALayer
from . import native
from .formulas import Gradients, Kept, Wanted, tail_backward, tail_forward
from .passes import accumulation_dtype
from .second_order import recorded_backward
from .stock_modules import is_bare, is_eca

eca_triton = None
_not_imported = "PyTorch finds no CUDA device"
if torch.cuda.is_available():  # where it is not, Triton's import would only cost time
    try:
        from . import triton_operators as eca_triton
    except Exception as error:  # also of a Triton that does not fit this PyTorch
        _not_imported = f"Triton cannot be imported: {error}"


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """None if Triton kernels serve tensors of `dtype` on `device`, else in one line the reason."""
    if device.type != "cuda":
        return "they are for CUDA devices"
    if eca_triton is None:
        return _not_imported
    if dtype not in eca_triton.DTYPES:
        return f"there are none for {dtype}"
    return eca_triton.why_not(device, dtype)


def _on_triton(z: Tensor) -> bool:
    return z.is_cuda and why_not_triton(z.device, z.dtype) is None


def _forward(z, weight, bias, kernel, residual, statistics, eps, activation):
    """`tail_forward` by whatever serves z best, but with the batch's unbiased variance."""
    if not _on_triton(z):
        given = (z, weight, bias, kernel, residual, statistics, eps, activation)
        out, variance, kept = tail_forward(*given)
        if statistics is None:
            count = z.numel() // z.shape[1]
            variance = variance * (count / (count - 1))
        return out, variance, kept
    mean, variance = statistics or (None, None)
    out, *found, inverse_std, pooled, gate = eca_triton.tail_forward(
        z, weight, bias, kernel, residual, mean, variance, eps, activation
    )
    mean, variance = statistics or found
    return out, variance, Kept(mean, inverse_std, pooled, gate)


def _backward(grad, z, out, weight, bias, kernel, kept, batch_statistics, wanted):
    """`tail_backward` likewise. grad and z are of one memory format."""
    if not _on_triton(z):
        given = (grad, z, out, weight, bias, kernel, kept, batch_statistics, wanted)
        return tail_backward(*given)
    dz, d_weight, d_bias, d_kernel, d = eca_triton.tail_backward(
        grad, z, out, weight, bias, kernel, *kept, batch_statistics, wanted.z, wanted.residual
    )
    found = (dz, d_weight, d_bias, d_kernel, grad if out is None else d)
    return Gradients(*(g if want else None for g, want in zip(found, wanted, strict=True)))


def _widened(small: Tensor | None, z: Tensor) -> Tensor | None:
    return None if small is None else small.to(accumulation_dtype(z.dtype))


def _format_of(z: Tensor) -> torch.memory_format:
    """The format that z has, or, if it has gaps, that its copy should have."""
    nhwc = z.stride(1) == 1 and not z.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


class _FusedTail(torch.autograd.Function):
    """(z, weight, bias, kernel, residual) → out; the batch's mean, unbiased variance, or None."""

    @staticmethod
    def forward(ctx, z, weight, bias, kernel, residual, statistics, eps, activation):
        small = [_widened(t, z) for t in (weight, bias, kernel)]
        out, variance, kept = _forward(z, *small, residual, statistics, eps, activation)
        ctx.save_for_backward(z, out if activation else None, weight, bias, kernel, *kept)
        ctx.batch_statistics, ctx.eps = statistics is None, eps
        ctx.memory_format = _format_of(z)  # backward must not ask: Dynamo does not know it there
        if statistics is not None:
            return out, None, None
        ctx.mark_non_differentiable(kept.mean, variance)
        return out, kept.mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        z, out, weight, bias, kernel, *kept = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:5])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            given = (grad, z, out, weight, bias, kernel, Kept(*kept), ctx.eps)
            return *recorded_backward(*given, ctx.batch_statistics, wanted), None, None, None
        small = [_widened(t, z) for t in (weight, bias, kernel)]
        grad = grad.contiguous(memory_format=ctx.memory_format)
        found = _backward(grad, z, out, *small, Kept(*kept), ctx.batch_statistics, wanted)
        like = (z, weight, bias, kernel, grad)
        found = [g if g is None else g.to(t.dtype) for g, t in zip(found, like, strict=True)]
        return *found, None, None, None


def fused_tail(
    z: Tensor,
    bn: nn.BatchNorm2d,
    attention: ECALayer | None = None,
    residual: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """act(attention(bn(z)) + residual), with bn's running statistics kept as bn keeps them.

    Args:
        z: (N, C, H, W), the last convolution's output. Half precision is accumulated in float32.
        bn: in training mode, or without running statistics, it takes the batch's.
        residual: shape and dtype of z.
        activation: ReLU, or nothing.

    Returns:
        (N, C, H, W) in z's dtype and memory format.

    Call `can_fuse` first: it names the conditions, which are not checked here again.
    """
    batch_statistics = bn.training or bn.running_mean is None
    statistics = None
    if not batch_statistics:
        # A copy of the mean, which backward needs: a step in training mode may come before that.
        mean = bn.running_mean.to(accumulation_dtype(z.dtype), copy=True)
        statistics = (mean, _widened(bn.running_var, z))
    kernel = None if attention is None else attention.conv.weight.flatten()
    memory_format = _format_of(z)
    z = z.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    out, mean, variance = _FusedTail.apply(
        z, bn.weight, bn.bias, kernel, residual, statistics, bn.eps, activation
    )
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        _update_running_statistics(bn, mean, variance)
    return out


def _update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    """As nn.BatchNorm2d does: unbiased variance; momentum None is the average over all batches."""
    momentum, batches = bn.momentum, bn.num_batches_tracked
    if momentum is None and batches is None:
        return
    with torch.no_grad():
        if batches is not None:
            batches.add_(1)
        if momentum is None:
            momentum = [batches.to(bn.running_mean.dtype).reciprocal()] * 2
        running, found = (bn.running_mean, bn.running_var), (mean, unbiased)
        found = [new.to(old.dtype) for old, new in zip(running, found, strict=True)]
        torch._foreach_lerp_(running, found, momentum)  # on a GPU one launch


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which `_FusedTail` lacks."""
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
    """Whether `fused_tail` may stand for activation(attention(bn(z)) + residual).

    No, so that the modules are called one by one, for: other modules than BatchNorm2d, ECALayer
    and ReLU, or with another forward than theirs (SyncBatchNorm); an ECALayer whose pooling or
    convolution was changed (`stock_modules.is_eca`); BatchNorm without affine
    parameters; hooks on a module, as FLOPs counters attach them; tracing and export; torch.func's
    transforms and forward-mode differentiation; a residual that broadcasts or differs in dtype; a
    batch of one value a channel; an accelerator without kernels for the dtype, unless compiled.
    """
    modules = [(bn, nn.BatchNorm2d)]
    if activation is not None:
        modules.append((activation, nn.ReLU))
    if not all(is_bare(module, kind) for module, kind in modules):
        return False
    if bn.weight is None or bn.bias is None:
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
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or _transformed():
        return False
    if z.dim() != 4 or not z.is_floating_point() or z.numel() <= z.shape[1]:
        return False
    if z.device.type not in ("cpu", "meta") and not (
        torch.compiler.is_compiling() or _on_triton(z)
    ):
        return False
    return residual is None or (residual.shape == z.shape and residual.dtype == z.dtype)


def block_tail(
    z: Tensor,
    bn: nn.Module,
    attention: nn.Module | None = None,
    residual: Tensor | None = None,
    activation: nn.Module | None = None,
    fused: bool = True,
) -> Tensor:
    """activation(attention(bn(z)) + residual): at once if wanted and possible, else in turn."""
    if fused and can_fuse(z, bn, attention, residual, activation):
        eager_cpu = z.device.type == "cpu" and not torch.compiler.is_compiling()
        if attention is None and eager_cpu and not _pays(z):
            return _plain_tail(z, bn, residual, activation is not None)
        return fused_tail(z, bn, attention, residual, activation is not None)
    y = bn(z)
    if attention is not None:
        y = attention(y)
    if residual is not None:
        y = y + residual
    return y if activation is None else activation(y)


def norm_act(z: Tensor, bn: nn.Module, activation: nn.Module, fused: bool = True) -> Tensor:
    """activation(bn(z)): in 3 and 7 passes in the place of 5 and 8, where that pays.

    Not under torch.compile, which fuses these two by itself.
    """
    if (
        fused
        and not torch.compiler.is_compiling()
        and not isinstance(z, torch.fx.Proxy)
        and _pays(z)
        and can_fuse(z, bn, None, None, activation)
    ):
        return fused_tail(z, bn)
    return activation(bn(z))


# Elements from which our passes beat PyTorch's own kernels where there is no attention, whose price
# is vectors of N·C numbers and calls: measured on two cores for the CPU, estimated for CUDA.
LARGE = {"cpu": 1 << 20, "cuda": 1 << 24}


def _pays(z: Tensor) -> bool:
    large = z.numel() >= LARGE.get(z.device.type, math.inf)
    return large and (_on_triton(z) or native.serves(z))


def _plain_tail(z: Tensor, bn: nn.Module, residual: Tensor | None, activation: bool) -> Tensor:
    """BatchNorm's own kernel, the rest in place: what serves small tensors on an eager CPU best.

    It keeps what `fused_tail` keeps, and nothing looks at what comes in between: no hooks.
    """
    y = bn(z)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if activation else y


def set_fused(network: nn.Module, fused: bool) -> int:
    """Sets `fused` on every block, and network, that has the switch, and says on how many."""
    found = [module for module in network.modules() if hasattr(module, "fused")]
    for module in found:
        module.fused = bool(fused)
    return len(found)

"""The fused tail's forward and backward passes, as functions of tensors in PyTorch's operations.

torch.compile makes one loop of each expression over (N, C, H, W). `native.cpp` and `triton_tail` do
the same steps, and are tested against these. Names: d is the output's gradient where the activation
lets it through, x̂ is normalised z, a = weight/σ, s is the gate; Σ is over the pixels of one sample
and channel. All but (N, C, H, W) tensors are in the accumulation dtype.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_passes import Gradients, Kept, Wanted, accumulation_dtype


def over_pixels(small: Tensor) -> Tensor:
    """(N or 1, C) → (N or 1, C, 1, 1)."""
    return small[:, :, None, None]


def activated(y: Tensor, ceiling: float | None) -> Tensor:
    """Computes min(max(y, 0), ceiling); NaN stays. None for no activation, infinity for ReLU."""
    if ceiling is None:
        return y
    return y.relu() if math.isinf(ceiling) else F.hardtanh(y, 0.0, ceiling)


def masked(grad: Tensor, out: Tensor | None, ceiling: float | None) -> Tensor:
    """Returns d, which is grad where 0 < out < ceiling, and 0 elsewhere; grad without `out`."""
    if out is None or ceiling is None:
        return grad
    if math.isinf(ceiling):
        return torch.ops.aten.threshold_backward(grad, out, 0)
    return torch.ops.aten.hardtanh_backward(grad, out, 0.0, ceiling)


def _neighbours(x: Tensor, k: int) -> list[Tensor]:
    """(N, C) → k tensors (N, C): the j-th holds what a kernel's j-th weight multiplies.

    Beyond the first and the last channel there are zeros.
    """
    padded = F.pad(x, (k // 2, k // 2))
    return [padded[:, j : j + x.shape[1]] for j in range(k)]


def along_channels(x: Tensor, kernel: Tensor) -> Tensor:
    """Computes conv1d over the channels of (N, C) with operations whose dtype autocast keeps.

    On a CPU it takes a fifth of conv1d's time, and its gradient a tenth.
    """
    first, *others = _neighbours(x, kernel.numel())
    y = first * kernel[0]
    for j, neighbour in enumerate(others, 1):
        y = torch.addcmul(y, neighbour, kernel[j])
    return y


def _kernel_gradient(x: Tensor, d: Tensor, k: int) -> Tensor:
    """Computes the gradient (k,) of `along_channels`' kernel; d is the output's gradient (N, C)."""
    return torch.stack([(neighbour * d).sum() for neighbour in _neighbours(x, k)])


def tail_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Kept]:
    """Returns out, the variance (C,), and what backward needs.

    Args:
        z, residual: (N, C, H, W) in one dtype and memory format.
        weight, bias, kernel: (C,), (C,) and (k,).
        statistics: a mean and a variance (C,) to use instead of the batch's. Without them the
            variance that is returned is the unbiased one, as running statistics are.
        ceiling: of the activation, see `activated`.
    """
    means = pooled = gate = None
    if statistics is None:
        x = z.to(weight.dtype)
        means = x.mean((2, 3))
        mean = means.mean(0)
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        count = z.numel() // z.shape[1]
        unbiased = variance * (count / (count - 1))
    else:
        mean, variance = statistics
        unbiased = variance
        if kernel is not None:
            means = z.mean((2, 3), dtype=accumulation_dtype(z.dtype))
    inverse_std = (variance + eps).rsqrt()
    scale = (weight * inverse_std)[None]
    shift = bias - mean * scale
    if kernel is not None:
        assert means is not None
        pooled = (means - mean) * inverse_std
        gate = along_channels(torch.addcmul(bias, pooled, weight), kernel).sigmoid()
        scale, shift = scale * gate, shift * gate
    y = z.to(scale.dtype) * over_pixels(scale) + over_pixels(shift)
    if residual is not None:
        y = y + residual
    out = activated(y, ceiling).to(z.dtype)
    return out, unbiased, Kept(mean, inverse_std, pooled, gate)


def tail_backward(
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
    """Computes the gradients of `tail_forward`; `out` is None if there is no activation."""
    pixels, count = z.shape[2] * z.shape[3], z.numel() // z.shape[1]
    mean, inverse_std, pooled, gate = kept
    a = weight * inverse_std
    d = masked(grad, out, ceiling)
    wide, x = d.to(mean.dtype), z.to(mean.dtype)
    sum_d = wide.sum((2, 3))
    sum_dx = (wide * (x - mean[:, None, None])).sum((2, 3)) * inverse_std  # Σ d·x̂
    on_grad = a[None]
    constant = d_kernel = None
    if kernel is not None:
        assert pooled is not None
        assert gate is not None
        on_grad = a * gate
        d_gate = torch.addcmul(bias * sum_d, weight, sum_dx)
        d_logit = torch.ops.aten.sigmoid_backward(d_gate, gate)
        d_pooled = along_channels(d_logit, kernel.flip(0))
        d_kernel = _kernel_gradient(torch.addcmul(bias, pooled, weight), d_logit, kernel.numel())
        # From here on the sums are those with BatchNorm's output gradient s·d + ∂g/HW.
        sum_d = torch.addcmul(d_pooled, gate, sum_d)
        sum_dx = torch.addcmul(d_pooled * pooled, gate, sum_dx)
        constant = (a / pixels) * d_pooled
    d_bias, d_weight = sum_d.sum(0), sum_dx.sum(0)
    dz = None
    if wanted.z:
        dz = wide * over_pixels(on_grad)
        if batch_statistics:
            on_z = (a * inverse_std * d_weight / -count)[None]
            through_mean = -a * d_bias / count - on_z * mean
            constant = through_mean if constant is None else constant + through_mean
            dz = dz + x * over_pixels(on_z)
        if constant is not None:
            dz = dz + over_pixels(constant)
        dz = dz.to(z.dtype)
    return Gradients(
        dz,
        d_weight if wanted.weight else None,
        d_bias if wanted.bias else None,
        d_kernel if wanted.kernel else None,
        d if wanted.residual else None,
    )

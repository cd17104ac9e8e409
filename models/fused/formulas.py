"""The fused tail's forward and backward passes, as functions of tensors.

The passes over large tensors are those that `passes_for` chooses. `triton_tail` does the same
steps, each in a kernel. Names: d is the output's gradient where ReLU lets it through, x̂ is
normalised z, a = weight/σ, s is the gate; Σ is over the pixels of one sample and channel.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_passes import passes_for


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


class Kept(NamedTuple):
    """The small tensors of a forward pass that its backward pass needs."""

    mean: Tensor  # (C,)
    inverse_std: Tensor  # 1 / √(variance + eps), (C,)
    pooled: Tensor | None  # means over the pixels of normalised z, (N, C); None without ECA
    gate: Tensor | None  # s, (N, C); None without ECA


class Gradients(NamedTuple):
    z: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    kernel: Tensor | None
    residual: Tensor | None


class Wanted(NamedTuple):
    """Which gradients the caller needs."""

    z: bool
    weight: bool
    bias: bool
    kernel: bool
    residual: bool


def tail_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: bool,
) -> tuple[Tensor, Tensor, Kept]:
    """Returns out, the variance (C,) that was used, and what backward needs.

    `statistics` are a mean and variance (C,) to use instead of the batch's. They, weight, bias (C,)
    and kernel (k,) have the accumulation dtype.
    """
    passes = passes_for(z)
    means = pooled = gate = None
    if statistics is None:
        means, mean, variance = passes.moments(z, kernel is not None)
    else:
        mean, variance = statistics
        if kernel is not None:
            means = passes.means(z)
    inverse_std = (variance + eps).rsqrt()
    scale = (weight * inverse_std)[None]
    shift = bias - mean * scale
    if kernel is not None:
        assert means is not None
        pooled = (means - mean) * inverse_std
        gate = along_channels(torch.addcmul(bias, pooled, weight), kernel).sigmoid()
        scale, shift = scale * gate, shift * gate
    out = passes.scale_and_add(z, scale, shift, residual, activation)
    return out, variance, Kept(mean, inverse_std, pooled, gate)


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
) -> Gradients:
    """Computes the gradients of `tail_forward`; `out` is None if there is no activation."""
    passes = passes_for(z)
    pixels, count = z.shape[2] * z.shape[3], z.numel() // z.shape[1]
    mean, inverse_std, pooled, gate = kept
    a = weight * inverse_std
    d, sum_d, sum_dz = passes.gradient_sums(grad, out, z, mean, wanted.residual)
    sum_dx = sum_dz * inverse_std  # Σ d·x̂, x̂ = (z - mean) · inverse_std
    on_grad = a[None]
    constant = on_z = d_kernel = None
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
    if batch_statistics:
        on_z = (a * inverse_std * d_weight / -count)[None]
        through_mean = -a * d_bias / count - on_z * mean
        constant = through_mean if constant is None else constant + through_mean
    dz = None
    if wanted.z:
        if out is not None and wanted.residual:
            grad, out = d, None  # masked already
        dz = passes.gradient_input(grad, out, z, on_grad, on_z, constant)
    return Gradients(
        dz,
        d_weight if wanted.weight else None,
        d_bias if wanted.bias else None,
        d_kernel if wanted.kernel else None,
        d if wanted.residual else None,
    )

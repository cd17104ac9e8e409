"""The fused tail's forward and backward passes, as functions of tensors.

Written once, on passes that `eca_passes` has in several forms; `eca_triton` follows the same steps
kernel by kernel. Names: d is the gradient of the output where ReLU let it through, x̂ normalised z,
a = weight/σ, s the gate; Σ is over the pixels of one sample and channel.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.eca_passes import Chunked, Whole


def _windows(x: Tensor, kernel: Tensor) -> Tensor:
    """(N, C) → (N, C, k): each channel's neighbourhood, zeros beyond the ends."""
    k = kernel.numel()
    return F.pad(x, (k // 2, k // 2)).unfold(1, k, 1)


def _along_channels(x: Tensor, kernel: Tensor) -> Tensor:
    """conv1d over the channels of (N, C), written so that autocast leaves its precision alone."""
    return (_windows(x, kernel) * kernel).sum(-1)


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
    """Which of the gradients are asked for."""

    z: bool
    weight: bool
    bias: bool
    kernel: bool
    residual: bool


def passes_for(z: Tensor) -> type[Whole] | type[Chunked]:
    return Chunked if z.device.type == "cpu" and not torch.compiler.is_compiling() else Whole


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
    """→ out, the variance (C,) that was used, and what backward needs.

    weight, bias (C,), kernel (k,) and `statistics`, a mean and variance (C,) to use in place of the
    batch's, are in the accumulation dtype.
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
        pooled = (means - mean) * inverse_std
        gate = _along_channels(pooled * weight + bias, kernel).sigmoid()
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
    """The gradients of `tail_forward`; `out` is None where there is no activation."""
    passes = passes_for(z)
    pixels, count = z.shape[2] * z.shape[3], z.numel() // z.shape[1]
    mean, inverse_std, pooled, gate = kept
    a = weight * inverse_std
    d, sum_d, sum_dz = passes.gradient_sums(grad, out, z, mean, wanted.residual)
    sum_dx = sum_dz * inverse_std  # Σ d·x̂, x̂ = (z - mean) · inverse_std
    on_grad = a[None]
    constant = on_z = d_kernel = None
    if kernel is not None:
        on_grad = a * gate
        d_logit = (weight * sum_dx + bias * sum_d) * gate * (1 - gate)
        d_pooled = _along_channels(d_logit, kernel.flip(0))
        d_kernel = (_windows(pooled * weight + bias, kernel) * d_logit[..., None]).sum((0, 1))
        # From here on the sums are those with BatchNorm's output gradient s·d + ∂g/HW.
        sum_d = gate * sum_d + d_pooled
        sum_dx = gate * sum_dx + d_pooled * pooled
        constant = a * d_pooled / pixels
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

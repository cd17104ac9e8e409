"""Launches the kernels of the fused tail: a function for each step, which also makes its results.

`triton_operators` calls these functions one after the other. z, grad, masked_by, residual and what
has the shape of z are (N, C, H, W) in z's dtype and memory format; all else is float32.
"""

import torch
import triton
from torch import Tensor

from . import triton_channel_kernels as channel_kernels
from . import triton_grids as grids
from . import triton_pass_kernels as pass_kernels


def statistics(
    z: Tensor, mean: Tensor, variance: Tensor, inverse_std: Tensor, eps: float, batch: bool
) -> Tensor:
    """Returns z's means over the pixels, (N, C).

    If `batch`, it also writes the batch's mean, unbiased variance and 1/σ into the three (C,).
    """
    n, c = z.shape[:2]
    g = grids.Grid.of(z, grids.REDUCE)
    means = z.new_empty((n, c), dtype=torch.float32)
    parts = z.new_empty((1 + batch, g.splits, n, c), dtype=torch.float32)
    pass_kernels.moments[g.programs](
        z, parts[0], parts[-1], c, g.hw, g.per, SQUARES=batch, **g.tile
    )
    channel_kernels.statistics[grids.small_grid(c)](
        parts[0],
        parts[-1],
        means,
        mean,
        variance,
        inverse_std,
        n,
        c,
        g.hw,
        g.per,
        g.splits,
        eps,
        BATCH=batch,
        **grids.SMALL,
    )
    return means


def gate(
    means: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the normalised means and ECA's gate, (N, C) each."""
    n, c = means.shape
    pooled, gate = torch.empty_like(means), torch.empty_like(means)
    channel_kernels.gate[n, triton.cdiv(c, grids.ROW)](
        means,
        mean,
        inverse_std,
        weight,
        bias,
        kernel,
        pooled,
        gate,
        c,
        K=kernel.numel(),
        BC=grids.ROW,
    )
    return pooled, gate


def apply(
    z: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: bool,
) -> Tensor:
    """Returns act(BN(z) · gate + residual); None stands for a gate of 1, and for no residual."""
    out = torch.empty_like(z)
    g = grids.Grid.of(z, grids.APPLY)
    pass_kernels.apply[g.programs](
        z,
        mean,
        inverse_std,
        weight,
        bias,
        z.new_empty(0, dtype=torch.float32) if gate is None else gate,
        z if residual is None else residual,
        out,
        g.c,
        g.hw,
        g.per,
        ECA=gate is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        **g.tile,
    )
    return out


def gradient_sums(
    grad: Tensor, masked_by: Tensor, z: Tensor, mean: Tensor, activation: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns parts of Σd and Σd·(z - mean), (2, splits · N, C), and d itself, empty if not `keep`.

    d is grad where masked_by > 0; without activation it is grad.
    """
    n, c = z.shape[:2]
    d = torch.empty_like(z) if keep else z.new_empty(0)
    g = grids.Grid.of(z, grids.REDUCE)
    parts = z.new_empty((2, g.splits * n, c), dtype=torch.float32)
    pass_kernels.gradient_sums[g.programs](
        grad,
        masked_by,
        z,
        mean,
        parts[0],
        parts[1],
        d,
        c,
        g.hw,
        g.per,
        ACTIVATION=activation,
        KEEP=keep,
        **g.tile,
    )
    return parts, d


def gate_backward(
    parts: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor,
    pooled: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Σ∂y and Σ∂y·x̂ (2, N, C), y being BN(z); ∂pooled (N, C); and ∂kernel (k,)."""
    n, c = gate.shape
    k, blocks = kernel.numel(), triton.cdiv(c, grids.ROW)
    rows = parts.new_empty((2, n, c))
    d_pooled = torch.empty_like(rows[0])
    of_blocks = parts.new_empty((n * blocks, k))
    channel_kernels.gate_backward[n, blocks](
        parts[0],
        parts[1],
        inverse_std,
        weight,
        bias,
        kernel,
        pooled,
        gate,
        rows[0],
        rows[1],
        d_pooled,
        of_blocks,
        n,
        c,
        parts.shape[1] // n,
        K=k,
        BC=grids.ROW,
    )
    return rows, d_pooled, of_blocks.sum(0)


def parameter_gradients(
    rows: Tensor, inverse_std: Tensor, normalised: bool
) -> tuple[Tensor, Tensor]:
    """Returns ∂weight and ∂bias (C,): the sums of rows (2, rows, C).

    If not `normalised`, rows[1] has sums of d·(z - mean) in the place of d·x̂.
    """
    d_weight, d_bias = torch.empty_like(inverse_std), torch.empty_like(inverse_std)
    channel_kernels.parameter_gradients[grids.small_grid(rows.shape[2])](
        rows[0],
        rows[1],
        inverse_std,
        d_weight,
        d_bias,
        rows.shape[1],
        rows.shape[2],
        NORMALISED=normalised,
        **grids.SMALL,
    )
    return d_weight, d_bias


def gradient_input(
    grad: Tensor,
    masked_by: Tensor,
    z: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    d_pooled: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    batch: bool,
    activation: bool,
) -> Tensor:
    """Returns ∂z, with d as in `gradient_sums`.

    Without a gate d_pooled is not read. `batch` says that BatchNorm took the batch's statistics.
    """
    dz = torch.empty_like(z)
    g = grids.Grid.of(z, grids.APPLY)
    pass_kernels.gradient_input[g.programs](
        grad,
        masked_by,
        z,
        mean,
        inverse_std,
        weight,
        mean if gate is None else gate,
        d_pooled,
        d_weight,
        d_bias,
        dz,
        g.n,
        g.c,
        g.hw,
        g.per,
        BATCH=batch,
        ECA=gate is not None,
        ACTIVATION=activation,
        **g.tile,
    )
    return dz

"""The fused tail on CUDA: two custom operators that launch Triton kernels.

They compute what `formulas` computes. Tensors are dense, in channels_last or contiguous format, of
float32, bfloat16 or float16. Each operator has a version for fake tensors, which gives shapes
alone; so torch.compile and export do not look inside. With TRITON_INTERPRET=1 in the environment
they take CPU tensors.

First how the work is cut into programs: the numbers depend on the shape alone, so that sums are
added in the same order every time. Then a function for each step, which launches a kernel and makes
its results: z, grad, masked_by, residual and what has the shape of z are (N, C, H, W) in z's dtype
and memory format; all else is float32. Then the operators; `triton_trial` says whether they work.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels

TILE = 4096  # elements that a program holds at a time
PER_THREAD = 16  # of them, so that the registers suffice; half where a thread cannot load vectors
# Programs, by estimate: the 400 to 500 that run at once on 132 multiprocessors should have several
# turns, for the last is seldom full; but few parts, which one after the other are added up.
REDUCE, APPLY = 1056, 8192
SMALL = {"BN": 128, "BC": 8}  # tiles of the kernels that reduce (N, C) over N
ROW = 128  # channels a program of the kernels that work along them


class Grid(NamedTuple):
    """How a pass over (N, C, H, W) is cut into programs."""

    n: int
    c: int
    hw: int
    nhwc: bool
    block_c: int
    block_p: int
    vector: int  # a power of two that divides the length of a line of memory
    splits: int  # of the pixels
    per: int  # pixels in a split, a multiple of block_p

    @classmethod
    def of(cls, z: Tensor, programs: int) -> "Grid":
        """Cuts z into about `programs` programs, by its shape alone, so that sums do not vary."""
        n, c, h, w = z.shape
        return cls.cut(n, c, h * w, not z.is_contiguous(), programs)

    @classmethod
    @functools.cache  # a tenth of a tail's time on the host
    def cut(cls, n: int, c: int, hw: int, nhwc: bool, programs: int) -> "Grid":
        vector = math.gcd(16, c if nhwc else hw)
        tile = TILE if vector >= 4 else TILE // 2
        if nhwc:  # a row of 64 channels is a full line of memory in 16 bits and two in 32
            block_c = min(64, triton.next_power_of_2(c))
            block_p = min(tile // block_c, triton.next_power_of_2(hw))
        else:
            block_p = min(1024, tile, triton.next_power_of_2(hw))
            block_c = min(tile // block_p, 64, triton.next_power_of_2(c))
        wanted = triton.cdiv(programs, n * triton.cdiv(c, block_c))
        per = triton.cdiv(triton.cdiv(hw, wanted), block_p) * block_p
        return cls(n, c, hw, nhwc, block_c, block_p, vector, triton.cdiv(hw, per), per)

    @property
    def programs(self) -> tuple[int, int]:
        """Returns blocks of channels times samples, the blocks of a sample in a row; and splits."""
        return self.n * triton.cdiv(self.c, self.block_c), self.splits

    @property
    def tile(self) -> dict[str, int | bool]:
        per_thread = PER_THREAD if self.vector >= 4 else PER_THREAD // 2
        return {
            "NHWC": self.nhwc,
            "VEC": self.vector,
            "BC": self.block_c,
            "BP": self.block_p,
            "num_warps": max(1, self.block_c * self.block_p // (32 * per_thread)),
        }


def _limit(ceiling: float | None) -> float:
    """Returns a ceiling for the kernels: NaN, above which no number is, where there is none.

    So ReLU lets the gradient of an infinite output through, as PyTorch's does.
    """
    return math.nan if ceiling is None or math.isinf(ceiling) else ceiling


def small_grid(c: int) -> tuple[int]:
    """Returns the grid of the kernels that reduce (N, C) over N."""
    return (triton.cdiv(c, SMALL["BC"]),)


def on_device_of(z: Tensor) -> contextlib.AbstractContextManager:
    """While open, z's GPU is the current one, on which Triton launches."""
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def _statistics(
    z: Tensor, mean: Tensor, variance: Tensor, inverse_std: Tensor, eps: float, batch: bool
) -> Tensor:
    """Returns z's means over the pixels, (N, C).

    If `batch`, it also writes the batch's mean, unbiased variance and 1/σ into the three (C,).
    """
    n, c = z.shape[:2]
    g = Grid.of(z, REDUCE)
    means = z.new_empty((n, c), dtype=torch.float32)
    parts = z.new_empty((1 + batch, g.splits, n, c), dtype=torch.float32)
    kernels.moments[g.programs](z, parts[0], parts[-1], c, g.hw, g.per, SQUARES=batch, **g.tile)
    kernels.statistics[small_grid(c)](
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
        **SMALL,
    )
    return means


def _gate(
    means: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the normalised means and ECA's gate, (N, C) each."""
    n, c = means.shape
    pooled, gate = torch.empty_like(means), torch.empty_like(means)
    kernels.gate[n, triton.cdiv(c, ROW)](
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
        BC=ROW,
    )
    return pooled, gate


def _apply(
    z: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    ceiling: float | None,
) -> Tensor:
    """Returns act(BN(z) · gate + residual); None stands for a gate of 1, and for no residual."""
    out = torch.empty_like(z)
    g = Grid.of(z, APPLY)
    kernels.apply[g.programs](
        z,
        mean,
        inverse_std,
        weight,
        bias,
        z.new_empty(0, dtype=torch.float32) if gate is None else gate,
        z if residual is None else residual,
        out,
        _limit(ceiling),
        g.c,
        g.hw,
        g.per,
        ECA=gate is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=ceiling is not None,
        **g.tile,
    )
    return out


def _gradient_sums(
    grad: Tensor,
    out: Tensor | None,
    z: Tensor,
    mean: Tensor,
    ceiling: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Returns parts of Σd and Σd·(z - mean), (2, splits · N, C), and d itself, empty if not `keep`.

    d is grad where 0 < out < ceiling; without `out` it is grad.
    """
    n, c = z.shape[:2]
    d = torch.empty_like(z) if keep else z.new_empty(0)
    g = Grid.of(z, REDUCE)
    parts = z.new_empty((2, g.splits * n, c), dtype=torch.float32)
    kernels.gradient_sums[g.programs](
        grad,
        z if out is None else out,
        z,
        mean,
        parts[0],
        parts[1],
        d,
        _limit(ceiling),
        c,
        g.hw,
        g.per,
        ACTIVATION=out is not None,
        KEEP=keep,
        **g.tile,
    )
    return parts, d


def _gate_backward(
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
    k, blocks = kernel.numel(), triton.cdiv(c, ROW)
    rows = parts.new_empty((2, n, c))
    d_pooled = torch.empty_like(rows[0])
    of_blocks = parts.new_empty((n * blocks, k))
    kernels.gate_backward[n, blocks](
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
        BC=ROW,
    )
    return rows, d_pooled, of_blocks.sum(0)


def _parameter_gradients(
    rows: Tensor, inverse_std: Tensor, normalised: bool
) -> tuple[Tensor, Tensor]:
    """Returns ∂weight and ∂bias (C,): the sums of rows (2, rows, C).

    If not `normalised`, rows[1] has sums of d·(z - mean) in the place of d·x̂.
    """
    d_weight, d_bias = torch.empty_like(inverse_std), torch.empty_like(inverse_std)
    kernels.parameter_gradients[small_grid(rows.shape[2])](
        rows[0],
        rows[1],
        inverse_std,
        d_weight,
        d_bias,
        rows.shape[1],
        rows.shape[2],
        NORMALISED=normalised,
        **SMALL,
    )
    return d_weight, d_bias


def _gradient_input(
    grad: Tensor,
    out: Tensor | None,
    z: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    d_pooled: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    batch: bool,
    ceiling: float | None,
) -> Tensor:
    """Returns ∂z, with d as in `gradient_sums`.

    Without a gate d_pooled is not read. `batch` says that BatchNorm took the batch's statistics.
    """
    dz = torch.empty_like(z)
    g = Grid.of(z, APPLY)
    kernels.gradient_input[g.programs](
        grad,
        z if out is None else out,
        z,
        mean,
        inverse_std,
        weight,
        mean if gate is None else gate,
        d_pooled,
        d_weight,
        d_bias,
        dz,
        _limit(ceiling),
        g.n,
        g.c,
        g.hw,
        g.per,
        BATCH=batch,
        ECA=gate is not None,
        ACTIVATION=out is not None,
        **g.tile,
    )
    return dz


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("eca_net::tail_forward", mutates_args=())
def tail_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns out; mean, unbiased variance, inverse_std (C,); pooled and gate (N, C).

    Without mean and variance the batch's are used and returned; otherwise empty tensors are
    returned for them. Without a kernel pooled and gate are empty. All but z, residual and out are
    float32.

    Raises:
        ValueError: only one of mean and variance is given.
    """
    if (mean is None) != (variance is None):
        raise ValueError("tail_forward takes mean and variance together, or neither")
    batch, eca = mean is None, kernel is not None
    # Not one empty tensor for all: the results of an operator share no memory.
    new_mean, new_variance, pooled, gate = (z.new_empty(0, dtype=torch.float32) for _ in range(4))
    if mean is None or variance is None:
        new_mean, new_variance, inverse_std = (
            z.new_empty(z.shape[1], dtype=torch.float32) for _ in range(3)
        )
        mean, variance = new_mean, new_variance
    else:
        inverse_std = (variance + eps).rsqrt()
    with on_device_of(z):
        if batch or eca:
            means = _statistics(z, mean, variance, inverse_std, eps, batch)
        if kernel is not None:
            pooled, gate = _gate(means, mean, inverse_std, weight, bias, kernel)
        out = _apply(z, mean, inverse_std, weight, bias, gate if eca else None, residual, ceiling)
    return out, new_mean, new_variance, inverse_std, pooled, gate


@tail_forward.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c = z.shape[:2]

    def small(*shape: int) -> Tensor:
        return z.new_empty(shape, dtype=torch.float32)

    statistics = (c,) if mean is None else (0,)
    rows: tuple[int, ...] = (0,) if kernel is None else (n, c)
    return (
        torch.empty_like(z),
        small(*statistics),
        small(*statistics),
        small(c),
        small(*rows),
        small(*rows),
    )


@torch.library.custom_op("eca_net::tail_backward", mutates_args=())
def tail_backward(
    grad: Tensor,
    z: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    pooled: Tensor | None,
    gate: Tensor | None,
    batch_statistics: bool,
    want_z: bool,
    want_residual: bool,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns ∂z, ∂weight, ∂bias, ∂kernel, ∂residual; the first and last are empty if not wanted.

    Without activation `out` is None and ∂residual, which is grad itself, comes back empty.
    """
    keep = want_residual and out is not None
    d_kernel = d_pooled = mean.new_empty(0)
    dz = z.new_empty(0)
    with on_device_of(z):
        rows, d = _gradient_sums(grad, out, z, mean, ceiling, keep)
        if kernel is not None:
            assert pooled is not None
            assert gate is not None
            rows, d_pooled, d_kernel = _gate_backward(
                rows, inverse_std, weight, bias, kernel, pooled, gate
            )
        d_weight, d_bias = _parameter_gradients(rows, inverse_std, kernel is not None)
        if want_z:
            if keep:  # d is in memory: the kernel reads it alone, not grad and out
                grad, out = d, None
            dz = _gradient_input(
                grad,
                out,
                z,
                mean,
                inverse_std,
                weight,
                gate if kernel is not None else None,
                d_pooled,
                d_weight,
                d_bias,
                batch_statistics,
                ceiling,
            )
    return dz, d_weight, d_bias, d_kernel, d


@tail_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    pooled: Tensor | None,
    gate: Tensor | None,
    batch_statistics: bool,
    want_z: bool,
    want_residual: bool,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = z.new_empty(0)
    return (
        torch.empty_like(z) if want_z else nothing,
        torch.empty_like(mean),
        torch.empty_like(mean),
        mean.new_empty(0 if kernel is None else kernel.numel()),
        torch.empty_like(z) if want_residual and out is not None else z.new_empty(0),
    )

"""The fused tail on CUDA: two custom operators that launch Triton kernels.

The algebra is that of `eca_fused`. Tensors are dense, in channels_last or contiguous format, of
float32, bfloat16 or float16. Having shapes for fake tensors, the operators are opaque calls to
torch.compile and export. With TRITON_INTERPRET=1 in the environment they take CPU tensors.
"""

import threading

import torch
import triton
from torch import Tensor

from . import triton_channel_kernels as channel_kernels
from . import triton_grids as grids
from . import triton_pass_kernels as pass_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (7, 0)  # compute capability; torch.compile refuses older ones to Triton, too

_reasons: dict[tuple[torch.device, torch.dtype], str | None] = {}
_lock = threading.Lock()


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
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ out, mean, unbiased variance, inverse_std (C,), pooled, gate (N, C), as in `eca_fused`.

    mean and variance are given, and come back empty, or are the batch's. Without a kernel pooled
    and gate are empty. All but z, residual and out are float32.
    """
    batch, eca = mean is None, kernel is not None
    n, c = z.shape[:2]
    vector = z.new_empty(c, dtype=torch.float32)
    out = torch.empty_like(z)
    pooled = gate = means = z.new_empty((n, c) if eca else 0, dtype=torch.float32)
    if batch:
        new_mean, new_variance, inverse_std = (torch.empty_like(vector) for _ in range(3))
        mean, variance = new_mean, new_variance
    else:
        new_mean, new_variance = vector[:0].clone(), vector[:0].clone()
        inverse_std = (variance + eps).rsqrt()
    with grids.on_device_of(z):
        if batch or eca:
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
        if eca:
            gate = torch.empty_like(pooled)
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
        g = grids.Grid.of(z, grids.APPLY)
        pass_kernels.apply[g.programs](
            z,
            mean,
            inverse_std,
            weight,
            bias,
            gate,
            z if residual is None else residual,
            out,
            c,
            g.hw,
            g.per,
            ECA=eca,
            RESIDUAL=residual is not None,
            ACTIVATION=activation,
            **g.tile,
        )
    if not eca:
        pooled, gate = vector[:0].clone(), vector[:0].clone()
    return out, new_mean, new_variance, inverse_std, pooled, gate


@tail_forward.register_fake
def _(z, weight, bias, kernel, residual, mean, variance, eps, activation):
    n, c = z.shape[:2]

    def small(*shape):
        return z.new_empty(shape, dtype=torch.float32)

    statistics = (c,) if mean is None else (0,)
    rows = (0,) if kernel is None else (n, c)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ ∂z, ∂weight, ∂bias, ∂kernel, ∂residual; the first and last are empty if not wanted.

    Without activation `out` is None and ∂residual, which is grad itself, comes back empty.
    """
    eca, activation = kernel is not None, out is not None
    want_residual = want_residual and activation
    n, c = z.shape[:2]
    dz = torch.empty_like(z) if want_z else z.new_empty(0)
    dr = torch.empty_like(z) if want_residual else z.new_empty(0)
    d_weight, d_bias = torch.empty_like(mean), torch.empty_like(mean)
    d_kernel = d_pooled = mean.new_empty(0)
    masked_by = out if activation else z
    g = grids.Grid.of(z, grids.REDUCE)
    parts = z.new_empty((2, g.splits * n, c), dtype=torch.float32)
    with grids.on_device_of(z):
        pass_kernels.gradient_sums[g.programs](
            grad,
            masked_by,
            z,
            mean,
            parts[0],
            parts[1],
            dr,
            c,
            g.hw,
            g.per,
            ACTIVATION=activation,
            KEEP=want_residual,
            **g.tile,
        )
        rows = parts
        if eca:
            k, blocks = kernel.numel(), triton.cdiv(c, grids.ROW)
            rows = z.new_empty((2, n, c), dtype=torch.float32)
            d_pooled = torch.empty_like(rows[0])
            of_blocks = z.new_empty((n * blocks, k), dtype=torch.float32)
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
                g.splits,
                K=k,
                BC=grids.ROW,
            )
            d_kernel = of_blocks.sum(0)
        channel_kernels.parameter_gradients[grids.small_grid(c)](
            rows[0],
            rows[1],
            inverse_std,
            d_weight,
            d_bias,
            rows.shape[1],
            c,
            NORMALISED=eca,
            **grids.SMALL,
        )
        if want_z:
            if want_residual:  # d is in memory: one tensor to read, not two
                grad, activation = dr, False
            g = grids.Grid.of(z, grids.APPLY)
            pass_kernels.gradient_input[g.programs](
                grad,
                masked_by,
                z,
                mean,
                inverse_std,
                weight,
                gate if eca else mean,
                d_pooled,
                d_weight,
                d_bias,
                dz,
                n,
                c,
                g.hw,
                g.per,
                BATCH=batch_statistics,
                ECA=eca,
                ACTIVATION=activation,
                **g.tile,
            )
    return dz, d_weight, d_bias, d_kernel, dr


@tail_backward.register_fake
def _(
    grad,
    z,
    out,
    weight,
    bias,
    kernel,
    mean,
    inverse_std,
    pooled,
    gate,
    batch_statistics,
    want_z,
    want_residual,
):
    nothing = z.new_empty(0)
    return (
        torch.empty_like(z) if want_z else nothing,
        torch.empty_like(mean),
        torch.empty_like(mean),
        mean.new_empty(0 if kernel is None else kernel.numel()),
        torch.empty_like(z) if want_residual and out is not None else z.new_empty(0),
    )


@torch.compiler.assume_constant_result  # Dynamo calls it while it traces, and traces the answer
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the operators run on the device in the dtype, else in one line the reason why not.

    Found out once, by running them: when first used, Triton needs a C compiler and a driver that
    takes its code.
    """
    with _lock:  # DataParallel asks from a thread for each device
        if (device, dtype) not in _reasons:
            _reasons[device, dtype] = _tried(device, dtype)
        return _reasons[device, dtype]


def _tried(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return "compute capability {}.{}, and Triton needs {}.{}".format(*capability, *OLDEST)
    try:
        z = torch.ones(1, 8, 2, 2, device=device, dtype=dtype)
        vector = torch.ones(8, device=device, dtype=torch.float32)
        kernel = vector[:3]
        out, mean, _, inverse_std, pooled, gate = tail_forward(
            z, vector, vector, kernel, z, None, None, 1e-5, True
        )
        tail_backward(
            out, z, out, vector, vector, kernel, mean, inverse_std, pooled, gate, True, True, True
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # of Triton, the compilers or the driver: no one list of kinds
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    return None

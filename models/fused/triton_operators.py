"""The fused tail on CUDA: two custom operators that launch Triton kernels.

They compute what `formulas` computes. Tensors are dense, in channels_last or contiguous format, of
float32, bfloat16 or float16. Each operator has a version for fake tensors, which gives shapes
alone; so torch.compile and export do not look inside. With TRITON_INTERPRET=1 in the environment
they take CPU tensors.
"""

import threading

import torch
from torch import Tensor

from . import triton_grids as grids
from . import triton_launches as launches

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
    with grids.on_device_of(z):
        if batch or eca:
            means = launches.statistics(z, mean, variance, inverse_std, eps, batch)
        if kernel is not None:
            pooled, gate = launches.gate(means, mean, inverse_std, weight, bias, kernel)
        out = launches.apply(
            z, mean, inverse_std, weight, bias, gate if eca else None, residual, activation
        )
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
    activation: bool,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns ∂z, ∂weight, ∂bias, ∂kernel, ∂residual; the first and last are empty if not wanted.

    Without activation `out` is None and ∂residual, which is grad itself, comes back empty.
    """
    eca, activation = kernel is not None, out is not None
    masked_by = z if out is None else out
    keep = want_residual and activation
    d_kernel = d_pooled = mean.new_empty(0)
    dz = z.new_empty(0)
    with grids.on_device_of(z):
        rows, d = launches.gradient_sums(grad, masked_by, z, mean, activation, keep)
        if kernel is not None:
            assert pooled is not None
            assert gate is not None
            rows, d_pooled, d_kernel = launches.gate_backward(
                rows, inverse_std, weight, bias, kernel, pooled, gate
            )
        d_weight, d_bias = launches.parameter_gradients(rows, inverse_std, eca)
        if want_z:
            if keep:  # d is in memory: the kernel reads it alone, not grad and out
                grad, activation = d, False
            dz = launches.gradient_input(
                grad,
                masked_by,
                z,
                mean,
                inverse_std,
                weight,
                gate if eca else None,
                d_pooled,
                d_weight,
                d_bias,
                batch_statistics,
                activation,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = z.new_empty(0)
    return (
        torch.empty_like(z) if want_z else nothing,
        torch.empty_like(mean),
        torch.empty_like(mean),
        mean.new_empty(0 if kernel is None else kernel.numel()),
        torch.empty_like(z) if want_residual and out is not None else z.new_empty(0),
    )


# Dynamo calls it while it traces, and traces the answer.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None if the operators run on the device in the dtype, otherwise the reason, one line.

    The first call tries them: when first used, Triton needs a C compiler, and a driver that takes
    its code.
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

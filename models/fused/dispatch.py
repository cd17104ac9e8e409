"""Computes the fused tail by Triton kernels where they serve the tensor, otherwise by `formulas`.

Triton is imported only where PyTorch finds a CUDA device, and where the import fails the reason is
kept. `block_tail` calls this file for its passes, and `describe` for the reason.
"""

from types import ModuleType

import torch
from torch import Tensor

from .formulas import Gradients, Kept, Wanted, tail_backward, tail_forward

eca_triton: ModuleType | None = None
_not_imported = "PyTorch finds no CUDA device"
if torch.cuda.is_available():  # where it is not, Triton's import would only cost time
    try:
        from . import triton_operators

        eca_triton = triton_operators
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
    return eca_triton.why_not(device, dtype)


def on_triton(z: Tensor) -> bool:
    return z.is_cuda and why_not_triton(z.device, z.dtype) is None


def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: bool,
) -> tuple[Tensor, Tensor, Kept]:
    """Computes `tail_forward` by what serves z best; the variance is the unbiased one."""
    if not on_triton(z):
        out, variance, kept = tail_forward(
            z, weight, bias, kernel, residual, statistics, eps, activation
        )
        if statistics is None:
            count = z.numel() // z.shape[1]
            variance = variance * (count / (count - 1))
        return out, variance, kept
    assert eca_triton is not None
    out, *found, inverse_std, pooled, gate = eca_triton.tail_forward(
        z, weight, bias, kernel, residual, *(statistics or (None, None)), eps, activation
    )
    mean, variance = statistics or found
    return out, variance, Kept(mean, inverse_std, pooled, gate)


def backward(
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
    """Computes `tail_backward` by what serves z best; grad and z have one memory format."""
    if not on_triton(z):
        return tail_backward(grad, z, out, weight, bias, kernel, kept, batch_statistics, wanted)
    assert eca_triton is not None
    dz, d_weight, d_bias, d_kernel, d = eca_triton.tail_backward(
        grad, z, out, weight, bias, kernel, *kept, batch_statistics, wanted.z, wanted.residual
    )
    found = (dz, d_weight, d_bias, d_kernel, grad if out is None else d)
    return Gradients(*(g if want else None for g, want in zip(found, wanted, strict=True)))

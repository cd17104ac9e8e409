"""Computes the fused tail by Triton kernels where they serve the tensor, otherwise by `formulas`.

Triton is imported only where PyTorch finds a CUDA device, and where the import fails the reason is
kept. `block_tail` calls this file for its passes, and `describe` for the reason.
"""

import torch
from torch import Tensor

from .formulas import Gradients, Kept, tail_backward, tail_forward

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


def on_triton(z: Tensor) -> bool:
    return z.is_cuda and why_not_triton(z.device, z.dtype) is None


def forward(z, weight, bias, kernel, residual, statistics, eps, activation):
    """`tail_forward` by whatever serves z best, but with the batch's unbiased variance."""
    if not on_triton(z):
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


def backward(grad, z, out, weight, bias, kernel, kept, batch_statistics, wanted):
    """`tail_backward` likewise. grad and z are of one memory format."""
    if not on_triton(z):
        given = (grad, z, out, weight, bias, kernel, kept, batch_statistics, wanted)
        return tail_backward(*given)
    dz, d_weight, d_bias, d_kernel, d = eca_triton.tail_backward(
        grad, z, out, weight, bias, kernel, *kept, batch_statistics, wanted.z, wanted.residual
    )
    found = (dz, d_weight, d_bias, d_kernel, grad if out is None else d)
    return Gradients(*(g if want else None for g, want in zip(found, wanted, strict=True)))

"""Chooses the form of the fused tail's passes over (N, C, H, W) that serves a tensor best.

Every form has the same passes, with the same arguments: `Whole` for torch.compile and for devices
other than the CPU, `Native` for an eager CPU, and `Chunked` where `Native` cannot be compiled.

z, residual, out and grad are (N, C, H, W) in one dtype and memory format. All other tensors are
(C,), (1, C) or (N, C) in the accumulation dtype: float64 for float64, otherwise float32.
"""

import torch
from torch import Tensor

from .chunked_passes import Chunked, Chunks
from .native import Native, serves
from .whole_passes import Whole, over_pixels


def passes_for(z: Tensor) -> type[Whole] | type[Chunked] | type[Native]:
    """Returns the form of the passes that is fastest for z."""
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return Whole
    return Native if serves(z) else Chunked


def _is_dense(z: Tensor) -> bool:
    return z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)


def pixel_means(z: Tensor) -> Tensor:
    """Computes means over the pixels, (N, C) in the accumulation dtype, for z of any strides."""
    passes = passes_for(z)
    return (passes if passes is not Native or _is_dense(z) else Whole).means(z)


def finish_in_place(
    z: Tensor, scale: Tensor | None, residual: Tensor | None, activation: bool
) -> Tensor:
    """Computes act(z · scale + residual) without gradients; it may overwrite z.

    scale is (N, C) in the accumulation dtype, or None for 1.
    """
    passes = passes_for(z)
    if passes is Native and _is_dense(z) and (residual is None or residual.stride() == z.stride()):
        scale = z.new_ones(1, z.shape[1], dtype=torch.float32) if scale is None else scale
        return Native.scale_and_add(z, scale, torch.zeros_like(scale), residual, activation, z)
    if scale is not None:
        scale = over_pixels(scale.to(z.dtype))
    if passes is Whole:
        if scale is None:
            y = z if residual is None else z + residual
        else:
            y = z * scale if residual is None else torch.addcmul(residual, z, scale)
        return y.relu() if activation else y
    for s in Chunks(z).slices:
        y = z[s]
        if scale is not None and residual is not None:
            torch.addcmul(residual[s], y, scale[s], out=y)
        elif scale is not None:
            y.mul_(scale[s])
        elif residual is not None:
            y.add_(residual[s])
        if activation:
            y.relu_()
    return z

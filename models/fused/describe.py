"""Describes in words how a network's block tails will run: fused and by what, or why not.

The words for a device agree with what `can_fuse` and `block_tail` decide for a tensor on it.
"""

import torch
from torch import nn

from . import native
from .dispatch import why_not_triton


def describe_tails(
    network: nn.Module,
    device: torch.device,
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    sync_bn: bool = False,
) -> str:
    """Describes for a report, in a few words, how `network`'s block tails will run on `device`.

    Args:
        fused: the value that `set_fused` gets.
        dtype: the dtype of the activations.
        compiled: the network will run under torch.compile.
        sync_bn: the BatchNorms will become SyncBatchNorm.
    """
    attentions = (getattr(module, "attention", None) for module in network.modules())
    named = {name for name in attentions if isinstance(name, str)}
    others = ", ".join(sorted(named - {"eca", "none"}))
    sync_bn = sync_bn or any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())
    on_cuda = device.type == "cuda"
    no_triton = why_not_triton(device, dtype) if on_cuda else None
    obstacles: tuple[tuple[object, str], ...] = (
        (not fused, ""),
        (sync_bn, " (SyncBatchNorm)"),
        (others, f" (attention {others})"),
        (no_triton and not compiled, f" ({no_triton})"),
        (device.type not in ("cpu", "cuda") and not compiled, f" (no kernels for {device.type})"),
    )
    for stands, why in obstacles:
        if stands:
            return f"block tails module by module{why}"
    if device.type == "cpu" and not compiled and (no_native := native.why_not(dtype)):
        if named == {"none"}:
            return f"block tails by BatchNorm's own kernel, the rest in place ({no_native})"
        return f"fused block tails by PyTorch's operations ({no_native})"
    if device.type == "cpu" and not compiled and named == {"none"}:
        return "fused block tails, small ones by BatchNorm's own kernel"
    return f"fused block tails{' (Triton)' if on_cuda and no_triton is None else ''}"

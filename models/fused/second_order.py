"""The fused tail's gradients in operations that can be differentiated again (gradient penalties).

`block_tail` calls it where backward is itself recorded (`create_graph=True`). It is slower than
`tail_backward` and keeps what autograd keeps for the modules called one by one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .formulas import Gradients, Kept, Wanted
from .whole_passes import accumulation_dtype


def recorded_backward(
    grad: Tensor,
    z: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor | None,
    kept: Kept,
    eps: float,
    batch_statistics: bool,
    wanted: Wanted,
) -> Gradients:
    """The gradients of `tail_forward` for tensors that carry their own history.

    Arguments as those of `tail_backward`, in the dtypes that the network has them in.
    """
    wide = accumulation_dtype(z.dtype)
    d = grad if out is None else grad * (out > 0)
    with torch.enable_grad():
        w, b, x = weight.to(wide), bias.to(wide), z.to(wide)
        if batch_statistics:
            y = F.batch_norm(x, None, None, w, b, training=True, eps=eps)
        else:
            scale = w * kept.inverse_std
            y = x * scale[:, None, None] + (b - kept.mean * scale)[:, None, None]
        if kernel is not None:
            pooled = y.mean((2, 3)).unsqueeze(1)
            gate = F.conv1d(pooled, kernel.to(wide)[None, None], padding=kernel.numel() // 2)
            y = y * gate.sigmoid().transpose(1, 2).unsqueeze(-1)
        inputs = (z, weight, bias, kernel)
        asked = [t for t, want in zip(inputs, wanted, strict=False) if want and t is not None]
        found = iter(torch.autograd.grad(y, asked, d.to(wide), create_graph=True) if asked else ())
    z_, weight_, bias_, kernel_ = (next(found) if want else None for want in wanted[:4])
    return Gradients(z_, weight_, bias_, kernel_, d if wanted.residual else None)

"""Grad-CAM: where in an image a classifier found what speaks for a class.

Selvaraju et al., Grad-CAM, ICCV 2017, arXiv 1610.02391.
"""

import torch
from torch import Tensor, nn


def grad_cam(
    network: nn.Module, stage: nn.Module, images: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Class-activation maps of a batch.

    Args:
        network: (N, 3, H, W) → logits (N, C), in eval mode; with its parameters frozen
            (`requires_grad_(False)`) no graph is kept for what lies before `stage`.
        stage: the part of it whose output (N, c, h, w) is looked at.
        images: (N, 3, H, W).
        classes: (N,) the class that each map is for; by default the one with the highest logit.

    Returns:
        logits (N, C) and maps (N, h, w), each from 0 to a maximum of 1. A map is 0 throughout when
        nothing in the image speaks for the class.
    """
    seen = []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())  # the graph begins here
        return seen[-1]

    handle = stage.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = network(images)
            chosen = logits.detach().argmax(1) if classes is None else classes
            score = logits.gather(1, chosen[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, seen[-1])
    finally:
        handle.remove()
    features = seen[-1].detach()
    weights = gradient.mean((2, 3), keepdim=True)  # eq. 1 of the paper
    maps = (weights * features).sum(1).clamp_(min=0).float()  # eq. 2
    peak = maps.amax((1, 2), keepdim=True)
    return logits.detach(), maps / torch.where(peak > 0, peak, 1)

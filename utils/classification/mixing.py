"""Blends images by mixup and cutmix; the targets become shares of two classes."""

from collections.abc import Callable

import torch

Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def unmixed(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch as it is."""
    return images, targets


def make_mix(mixup: float, cutmix: float, num_classes: int) -> Mix:
    """Returns a function (images (N, 3, S, S), targets (N,)) → (mixed images, shares (N,
    num_classes)).

    torchvision's transforms do it. They pair each image with the one before it and draw one share
    for the whole batch, from torch's default CPU generator: seeded by the step, a batch is mixed
    the same way whenever it comes, and nothing waits for the device.

    Args:
        mixup, cutmix: alpha of each Beta distribution; 0 leaves that one out, both at 0 all of it,
            and with both a batch takes one of them by even chance.
    """
    if not mixup and not cutmix:
        return unmixed
    from torchvision.transforms import v2  # slow to import, and few runs need it

    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha
    ]
    return v2.RandomChoice(kinds)


def leading_class(targets: torch.Tensor) -> torch.Tensor:
    """Returns (N,) classes; of shares (N, C), as mixing makes them, those with the largest."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)

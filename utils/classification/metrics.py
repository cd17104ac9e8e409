"""Sums loss and hits on the device, so that counting costs no synchronisation."""

import torch
from torch.nn import functional as F

from utils.system import distributed


def count_correct(logits: torch.Tensor, targets: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """Counts how many of N samples have their class among the k highest logits.

    Args:
        logits: (N, C). With C < k every sample counts as correct.
        targets: (N,) int64 class indices.
        ks: the k's asked for.

    Returns:
        (len(ks),) float64 counts. A row that is not finite is never correct: NaN sorts first in
        topk, which would make a ruined network look perfect for class 0.
    """
    _, hits = ranked(logits, targets, max(ks))
    return torch.stack([hits[:, :k].sum() for k in ks]).to(wide(logits.device))


def ranked(
    logits: torch.Tensor, targets: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `most` likely classes of N samples, or all C < most, and which is the true one.

    Args:
        logits, targets: see `count_correct`.

    Returns:
        (N, most) int64 classes, the most likely first; (N, most) bool, False in each row that is
        not finite.
    """
    top = logits.topk(min(most, logits.shape[1]), dim=1).indices
    return top, (top == targets[:, None]) & logits.isfinite().all(dim=1, keepdim=True)


class ClassificationMeter:
    """Sums loss, top-1 and top-5 over what `update` has seen.

    State: four sums (loss, top-1 hits, top-5 hits, samples) on the device, this rank's share.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=wide(device), device=device)

    @torch.no_grad()
    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a batch: its mean loss (scalar), logits (N, C) and targets (N,)."""
        n = len(targets)
        self.sums[0] += loss.detach() * n
        self.sums[1:3] += count_correct(logits.detach(), targets, (1, 5))
        self.sums[3] += n

    def total(self) -> torch.Tensor:
        """Returns the four sums over all ranks, on the host. Call it on every rank."""
        return distributed.all_reduce(self.sums.clone()).cpu()

    @staticmethod
    def means(total: torch.Tensor) -> dict[str, float]:
        """Returns {"loss", "top1", "top5"} of `total()`: mean loss, and percentages."""
        loss, top1, top5, n = total.tolist()
        n = n or float("nan")
        return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n}


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the mean cross-entropy in float32, whatever the precision of the logits (N, C).

    Args:
        targets: (N,) class indices, or (N, C) shares of the classes.
        label_smoothing: share of each target that is divided evenly among the classes.
        class_weights: (C,) factors of the classes' terms; None for 1. The sum is divided by N, not
            by the weights of the batch: so each part of a batch, on any rank, counts by its size.
    """
    if class_weights is None:
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    total = F.cross_entropy(
        logits.float(), targets, class_weights, reduction="sum", label_smoothing=label_smoothing
    )
    return total / len(targets)


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> torch.Tensor:
    """Returns the mean binary cross-entropy over images and classes, in float32, as timm's.

    Args:
        logits: (N, C); each says of one class whether it is there (Beyer et al. 2020).
        targets, label_smoothing: as in `cross_entropy`.
        class_weights: (C,) factors of the classes' terms; None for 1.
        threshold: smoothed shares above it count as 1, and others as 0; 0 leaves them as they are.
    """
    classes = logits.shape[1]
    shares = targets if targets.ndim == 2 else F.one_hot(targets, classes)
    shares = (1 - label_smoothing) * shares.float() + label_smoothing / classes
    if threshold:
        shares = (shares > threshold).float()
    return F.binary_cross_entropy_with_logits(logits.float(), shares, class_weights)


def wide(device: torch.device) -> torch.dtype:
    """Returns the type of sums on a device: float64 where it has it."""
    # float64 keeps counts exact past 2^24 and sums independent of their size; Apple GPUs lack it.
    return torch.float32 if device.type == "mps" else torch.float64

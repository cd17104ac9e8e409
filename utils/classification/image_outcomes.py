"""Keeps, image by image, what a network made of a validation set, beside the sums of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from utils.classification.metrics import ClassificationMeter, ranked, wide
from utils.system import distributed

NONE = -1  # the class that was found where the logits are not finite


@dataclass(frozen=True)
class ImageOutcomes:
    """Holds what was found in each of n images, in the order of the data set.

    Attributes:
        true: (n,) int64 classes.
        found: (n,) int64 classes; NONE where the network's output is not finite.
        in_top5: (n,) bool, the true class is among the five most likely ones.
        confidence: (n,) float64 probability of `found`, 0 to 1; NaN where there is none.
        true_confidence: (n,) float64 probability of `true`.
        loss: (n,) float64 cross-entropy.
        outputs: of the network: as many as there are classes, or more.
    """

    true: np.ndarray
    found: np.ndarray
    in_top5: np.ndarray
    confidence: np.ndarray
    true_confidence: np.ndarray
    loss: np.ndarray
    outputs: int

    def __len__(self) -> int:
        return len(self.true)

    def worst(self, most: int) -> np.ndarray:
        """Returns the numbers of the images with the highest loss, the highest first.

        A loss that is no number comes before all others, and of equal ones the first image.
        """
        loss = np.where(np.isfinite(self.loss), self.loss, np.inf)
        return np.argsort(-loss, kind="stable")[:most]


class OutcomeMeter(ClassificationMeter):
    """Sums as `ClassificationMeter` does, to the last bit, and keeps each image's outcome."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.rows: list[torch.Tensor] = []  # (N, 6) a batch, on the device
        self.outputs = 0  # of the network

    @torch.no_grad()
    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a batch: its mean loss (scalar), logits (N, C) and targets (N,)."""
        super().update(loss, logits, targets)
        top, hits = ranked(logits, targets, 5)
        logs = F.log_softmax(logits.float(), dim=1)
        true = logs.gather(1, targets[:, None])[:, 0]
        finite = logits.isfinite().all(dim=1)
        nothing = torch.full_like(true, float("nan"))
        columns = (
            targets,
            torch.where(finite, top[:, 0], NONE),
            hits.any(dim=1),
            torch.where(finite, logs.gather(1, top[:, :1])[:, 0].exp(), nothing),
            torch.where(finite, true.exp(), nothing),
            torch.where(finite, -true, nothing),
        )
        kind = wide(logits.device)
        self.outputs = logits.shape[1]
        self.rows.append(torch.stack([column.to(kind) for column in columns], dim=1))

    def outcomes(self, indices: Sequence[int], images: int) -> ImageOutcomes:
        """Puts the outcomes of all ranks in the data set's order. Call it on every rank.

        Args:
            indices: of this rank's images in the data set, in the order of `update`.
            images: in the data set.
        """
        own = torch.cat(self.rows).cpu().numpy() if self.rows else np.zeros((0, 6))
        everywhere = distributed.gather((np.asarray(indices, np.int64), own, self.outputs))
        places = np.concatenate([places for places, _, _ in everywhere])
        rows = np.concatenate([rows for _, rows, _ in everywhere])
        each_once = np.array_equal(np.sort(places), np.arange(images))
        assert each_once, places
        rows = rows[np.argsort(places)].T
        true, found, in_top5 = (rows[i].astype(np.int64) for i in range(3))
        outputs = max(outputs for _, _, outputs in everywhere)  # 0 on a rank without images
        shares = rows[3:].astype(np.float64)
        return ImageOutcomes(true, found, in_top5.astype(bool), *shares, outputs)

"""Compares the objects that an exported detector finds with those of its network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.system.errors import EXIT_FAILED, UserError

PIXELS, SCORE, OVERLAP = 0.1, 1e-4, 0.9  # that boxes and scores may be off; masks' least IoU

Objects = dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Says how a file's objects differ from its network's.

    Args:
        objects: that were compared.
        pixels: the largest difference of a box's corner.
        overlap: the smallest IoU of two masks; 1 without masks.
        tied: objects in whose place the file has another one of the same label and score. Of two
            boxes that overlap, rounding then decides which one stays.
    """

    objects: int
    pixels: float
    overlap: float
    tied: int


def compare(expected: Objects, found: Objects, lowest: float, where: str) -> Agreement:
    """Finds each of the network's objects among the file's, whose order may differ in ties.

    Args:
        expected: the network's.
        found: the file's.
        lowest: objects that do not score more may be on one side alone.
        where: for messages.

    Raises:
        UserError: one is missing, or another one is there.
    """
    free = set(range(len(found["scores"])))
    wanted, missing = _above(expected, lowest), []
    pixels, overlap = 0.0, 1.0
    for i in wanted:
        alike = [j for j in sorted(free) if _is_tied(expected, i, found, j)]
        near = [j for j in alike if _distance(expected, i, found, j) <= PIXELS]
        if not near:
            missing.append(i)
            continue
        j = min(near, key=lambda j: _distance(expected, i, found, j))
        free.remove(j)
        pixels = max(pixels, _distance(expected, i, found, j))
        if "masks" in expected:
            overlap = min(overlap, _overlap(expected["masks"][i], found["masks"][j]))
    for i in missing:
        tied = [j for j in sorted(free) if _is_tied(expected, i, found, j)]
        if not tied:
            raise UserError(
                f"{where}: the file lacks an object that the network finds (label "
                f"{int(expected['labels'][i])}, score {expected['scores'][i]:.4f}); not written",
                EXIT_FAILED,
            )
        free.remove(tied[0])
    if free & set(_above(found, lowest + SCORE)):
        raise UserError(
            f"{where}: the file finds an object that the network does not; not written", EXIT_FAILED
        )
    if overlap < OVERLAP:
        raise UserError(
            f"{where}: a mask shares {100 * overlap:.0f} % with the network's; not written",
            EXIT_FAILED,
        )
    return Agreement(len(wanted), pixels, overlap, len(missing))


def _above(objects: Objects, lowest: float) -> Sequence[int]:
    return torch.where(objects["scores"] > lowest)[0].tolist()


def _distance(expected: Objects, i: int, found: Objects, j: int) -> float:
    return float((expected["boxes"][i] - found["boxes"][j]).abs().max())


def _is_tied(expected: Objects, i: int, found: Objects, j: int) -> bool:
    """Tells whether two objects have one label and, but for rounding, one score."""
    return (
        int(expected["labels"][i]) == int(found["labels"][j])
        and abs(float(expected["scores"][i] - found["scores"][j])) <= SCORE
    )


def _overlap(a: Tensor, b: Tensor) -> float:
    """Computes the intersection over union of two masks from 0 to 1."""
    a, b = a > 0.5, b > 0.5
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0

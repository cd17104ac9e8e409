"""Computes a classifier's figures from the outcomes of its images: by class, pair and confidence.

All shares are from 0 to 1. tests/utils/classification/test_class_figures.py compares them with
scikit-learn's.
"""

from dataclasses import dataclass

import numpy as np

from utils.classification.image_outcomes import NONE, ImageOutcomes

BINS = 15  # of the calibration, as in Guo et al. 2017


@dataclass(frozen=True)
class ClassFigures:
    """Holds figures of C classes, each (C,); NaN where a figure is not defined.

    Attributes:
        support: int64, images of the class.
        predicted: int64, images that the network takes for the class.
        precision: share of `predicted` that is of the class; NaN where nothing was predicted.
        recall: share of `support` that is found. It is the class's top-1, too.
        f1: harmonic mean of both; NaN where neither an image nor a prediction is of the class.
        top5: share of `support` whose class is among the five most likely ones.
    """

    support: np.ndarray
    predicted: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    top5: np.ndarray

    @classmethod
    def of(cls, outcomes: ImageOutcomes, classes: int) -> "ClassFigures":
        """Computes the figures of `classes` classes."""
        hits = outcomes.found == outcomes.true

        def count(labels: np.ndarray) -> np.ndarray:
            return np.bincount(labels, minlength=classes)

        support, right = count(outcomes.true), count(outcomes.true[hits])
        predicted = count(outcomes.found[outcomes.found != NONE])
        return cls(
            support,
            predicted,
            _share(right, predicted),
            _share(right, support),
            _share(2 * right, support + predicted),
            _share(count(outcomes.true[outcomes.in_top5]), support),
        )

    def means(self) -> dict[str, float]:
        """Returns the means of precision, recall and F1 over the classes that have images.

        A precision without a prediction counts as 0, as scikit-learn's `zero_division=0` has it.
        """
        there = self.support > 0
        named = (("precision", self.precision), ("recall", self.recall), ("f1", self.f1))
        return {name: float(np.nan_to_num(values[there]).mean()) for name, values in named}


@dataclass(frozen=True)
class Pairs:
    """Holds which class was found in images of which, for the pairs that occur, each (p,) int64.

    Images in which no class was found (see NONE) are in none of them.
    """

    true: np.ndarray
    found: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, outcomes: ImageOutcomes, classes: int) -> "Pairs":
        """Counts the pairs of (true, found), sorted by both. With many classes most never occur."""
        judged = outcomes.found != NONE
        codes = outcomes.true[judged] * classes + outcomes.found[judged]
        pairs, images = np.unique(codes, return_counts=True)
        return cls(pairs // classes, pairs % classes, images)

    def confused(self) -> "Pairs":
        """Returns the pairs of different classes, the most frequent first."""
        wrong = np.flatnonzero(self.true != self.found)
        order = wrong[np.argsort(-self.images[wrong], kind="stable")]
        return Pairs(self.true[order], self.found[order], self.images[order])

    def matrix(self, classes: int) -> np.ndarray:
        """Returns (classes, classes) counts: rows are true classes, columns found ones."""
        matrix = np.zeros((classes, classes), np.int64)
        matrix[self.true, self.found] = self.images
        return matrix


@dataclass(frozen=True)
class Calibration:
    """Holds how often the network is right where it says how sure it is, in bins of confidence.

    Bin i holds the confidences above i / bins, up to (i + 1) / bins.

    Attributes:
        images: (bins,) int64.
        confidence: (bins,) mean confidence; NaN in an empty bin.
        accuracy: (bins,) share of the images that is right; NaN in an empty bin.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, outcomes: ImageOutcomes, bins: int = BINS) -> "Calibration":
        """Sorts the images by confidence; those in which no class was found are left out."""
        judged = outcomes.found != NONE
        confidence = outcomes.confidence[judged]
        right = (outcomes.found == outcomes.true)[judged]
        edges = np.linspace(0, 1, bins + 1)
        places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)

        def total(values: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(places, values, minlength=bins)

        images = total().astype(np.int64)
        return cls(images, _share(total(confidence), images), _share(total(right), images))

    @property
    def error(self) -> float:
        """Returns the expected calibration error: Σ images · |accuracy − confidence| / Σ images.

        NaN where no image was judged.
        """
        gaps = np.abs(self.accuracy - self.confidence)
        there = self.images > 0
        n = self.images.sum()
        return float((self.images * gaps)[there].sum() / n) if n else float("nan")

    def mean(self, values: np.ndarray) -> float:
        """Returns the mean over the images of `confidence` or `accuracy`."""
        there, n = self.images > 0, self.images.sum()
        return float((self.images * values)[there].sum() / n) if n else float("nan")


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole in float64; NaN where the whole is 0."""
    empty = np.full(len(whole), np.nan)
    return np.divide(part, whole, out=empty, where=whole > 0)

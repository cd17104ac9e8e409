"""Writes the tables of a report as CSV: by class, by pair, by confidence, the worst images.

Accuracies and probabilities are in %, as in metrics.csv. A figure that is not defined is an empty
cell.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np

from utils.classification.class_figures import Calibration, ClassFigures, Pairs
from utils.classification.image_outcomes import NONE, ImageOutcomes
from utils.system.text import cell


def classes_csv(figures: ClassFigures, names: Sequence[str]) -> bytes:
    """Returns one row a class."""
    titles = ("number", "class", "support", "predicted", "precision", "recall", "f1", "top1")
    shares = (figures.precision, figures.recall, figures.f1, figures.recall, figures.top5)
    rows = (
        [i, cell(name), figures.support[i], figures.predicted[i], *(percent(s[i]) for s in shares)]
        for i, name in enumerate(names)
    )
    return csv_file([*titles, "top5"], rows)


def confusion_csv(pairs: Pairs, names: Sequence[str]) -> bytes:
    """Returns one row a true class, one column a found class."""
    matrix = pairs.matrix(len(names))
    rows = ([cell(name), *row] for name, row in zip(names, matrix.tolist(), strict=True))
    return csv_file(["true \\ found", *map(cell, names)], rows)


def pairs_csv(confused: Pairs, support: np.ndarray, names: Sequence[str]) -> bytes:
    """Returns one row a pair of different classes, as `Pairs.confused` sorts them."""
    rows = (
        [true, cell(names[true]), found, cell(names[found]), n, percent(n / support[true])]
        for true, found, n in zip(confused.true, confused.found, confused.images, strict=True)
    )
    titles = ("true_number", "true", "found_number", "found", "images", "share_of_true")
    return csv_file(titles, rows)


def calibration_csv(calibration: Calibration) -> bytes:
    """Returns one row a bin."""
    bins = len(calibration.images)
    rows = (
        [percent(i / bins), percent((i + 1) / bins), n, percent(confidence), percent(accuracy)]
        for i, (n, confidence, accuracy) in enumerate(
            zip(calibration.images, calibration.confidence, calibration.accuracy, strict=True)
        )
    )
    return csv_file(("above", "up_to", "images", "confidence", "accuracy"), rows)


def worst_csv(
    outcomes: ImageOutcomes, worst: np.ndarray, paths: Sequence[str], names: Sequence[str]
) -> bytes:
    """Returns one row an image.

    Args:
        worst: numbers of the images.
        paths: of these images, below the folder or inside the shards.
    """
    titles = ("rank", "path", "true", "found", "probability_of_found", "probability_of_true")
    rows = (
        [
            rank,
            cell(path),
            cell(names[outcomes.true[i]]),
            "" if outcomes.found[i] == NONE else cell(names[outcomes.found[i]]),
            percent(outcomes.confidence[i]),
            percent(outcomes.true_confidence[i]),
            number(outcomes.loss[i]),
        ]
        for rank, (i, path) in enumerate(zip(worst, paths, strict=True), 1)
    )
    return csv_file([*titles, "loss"], rows)


def csv_file(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Returns a CSV file. Cells of a user's text have been through `cell`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return text.getvalue().encode()


def percent(share: float) -> str:
    """Returns a share from 0 to 1 in %; "" for one that is not defined."""
    return number(100 * share)


def number(value: float) -> str:
    """Returns a number with four decimals; "" for one that is not finite."""
    return f"{value:.4f}" if math.isfinite(value) else ""

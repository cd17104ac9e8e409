"""What a report of an evaluation holds: figures by class, confusions, calibration, worst images.

Shares are from 0 to 1 here; the tables have accuracies and probabilities in %, as metrics.csv has,
and an empty cell for a figure that is not defined. Tests compare the figures with scikit-learn's.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from utils.data.decoding import BrokenImageError, read_image
from utils.data.image_folder import ImageFolder
from utils.runs import folder as runs
from utils.system import distributed
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.text import cell, printable
from utils.training.classification import ClassificationMeter, ranked, wide

BINS = 15  # of the calibration, as in Guo et al. 2017
WHOLE_MATRIX = 1000  # classes up to which confusion.csv is written: beyond, it would be huge
CLASS_COLUMNS = [
    "number",
    "class",
    "support",
    "predicted",
    "precision",
    "recall",
    "f1",
    "top1",
    "top5",
]
PAIR_COLUMNS = ["true_number", "true", "found_number", "found", "images", "share_of_true"]
CALIBRATION_COLUMNS = ["above", "up_to", "images", "confidence", "accuracy"]
WORST_COLUMNS = [
    "rank",
    "path",
    "true",
    "found",
    "probability_of_found",
    "probability_of_true",
    "loss",
]
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


def tables(
    outcomes: ImageOutcomes,
    figures: ClassFigures,
    pairs: Pairs,
    calibration: Calibration,
    names: Sequence[str],
    paths: Sequence[str],
) -> dict[str, bytes]:
    """Returns the report's tables as CSV files: by class, pair and confidence, the worst images.

    Args:
        names: of all classes.
        paths: of the worst images, the worst first, below the folder or inside the shards.
    """
    safe = [cell(name) for name in names]
    shares = (figures.precision, figures.recall, figures.f1, figures.recall, figures.top5)
    counts = zip(safe, figures.support, figures.predicted, strict=True)
    classes = ([i, *row, *(percent(s[i]) for s in shares)] for i, row in enumerate(counts))
    confused = pairs.confused()
    listed = (
        [true, safe[true], found, safe[found], n, percent(n / figures.support[true])]
        for true, found, n in zip(confused.true, confused.found, confused.images, strict=True)
    )
    bins = len(calibration.images)
    edges = [percent(i / bins) for i in range(bins + 1)]
    measured = ([percent(v) for v in s] for s in (calibration.confidence, calibration.accuracy))
    confidences = zip(edges[:-1], edges[1:], calibration.images, *measured, strict=True)
    worst = (
        [
            rank,
            cell(path),
            safe[outcomes.true[i]],
            "" if outcomes.found[i] == NONE else safe[outcomes.found[i]],
            percent(outcomes.confidence[i]),
            percent(outcomes.true_confidence[i]),
            number(outcomes.loss[i]),
        ]
        for rank, (i, path) in enumerate(
            zip(outcomes.worst(len(paths)), paths, strict=True), start=1
        )
    )
    files = {
        "classes": csv_file(CLASS_COLUMNS, classes),
        "confused_pairs": csv_file(PAIR_COLUMNS, listed),
        "calibration": csv_file(CALIBRATION_COLUMNS, confidences),
        "worst_images": csv_file(WORST_COLUMNS, worst),
    }
    if len(names) <= WHOLE_MATRIX:
        matrix = zip(safe, pairs.matrix(len(names)).tolist(), strict=True)
        files["confusion"] = csv_file(["true \\ found", *safe], ([n, *row] for n, row in matrix))
    return {f"{name}.csv": data for name, data in files.items()}


def csv_file(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> bytes:
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


FOLDER, SUMMARY = "report", "report.json"
LISTED, DRAWN = 1000, 24  # worst images in the table, and in the picture
THUMBNAIL = 512  # pixels of the longer side that are kept for the picture


def write_report(
    parent: Path,
    outcomes: ImageOutcomes,
    images: ImageFolder,
    arch: str,
    told: Mapping[str, Any],
) -> Path:
    """Writes a report into `parent`/report, or report-2 and so on where there is one already.

    Args:
        outcomes: of all images.
        images: that were judged.
        arch: the network's name.
        told: "images", "top1", "top5" and "loss" as printed, "checkpoint", "data", and the
            environment.

    Returns:
        The report's folder. report.json is its last file: one without it was interrupted.
    """
    names = [printable(name) for name in images.classes]
    names += [f"class {i}" for i in range(len(names), outcomes.outputs)]
    figures = ClassFigures.of(outcomes, len(names))
    pairs = Pairs.of(outcomes, len(names))
    calibration = Calibration.of(outcomes)
    worst = outcomes.worst(LISTED)
    paths = [printable(images.paths[i]) for i in worst]
    files = tables(outcomes, figures, pairs, calibration, names, paths)
    title = f"{arch} on {_end(printable(told['data']))}, {len(outcomes):,} images"
    files |= _pictures(outcomes, figures, pairs, calibration, names, title)
    shown = worst[:DRAWN]
    files["worst_images.png"] = _worst_picture(outcomes, shown, images, paths, names, title)
    summary = _summary(outcomes, figures, calibration, names, told)
    folder = _new_folder(parent)
    for name, data in files.items():
        write_atomically(folder / name, data)
    runs.write_json(folder / SUMMARY, {**summary, "images_root": images.where, "arch": arch})
    return folder


def _summary(
    outcomes: ImageOutcomes,
    figures: ClassFigures,
    calibration: Calibration,
    names: list[str],
    told: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the figures of report.json, in %; those that are not defined are null."""
    means = {f"mean_{name}": 100 * value for name, value in figures.means().items()}
    found = {
        **means,
        "calibration_error": 100 * calibration.error,
        "mean_confidence": 100 * calibration.mean(calibration.confidence),
        "loss": told["loss"],
    }
    finite = {name: value if np.isfinite(value) else None for name, value in found.items()}
    return {
        **told,
        **finite,
        "classes": len(names),
        "classes_with_images": int((figures.support > 0).sum()),
        "images_without_finite_output": int((outcomes.found == NONE).sum()),
        "calibration_bins": len(calibration.images),
        "class_names": names,
    }


def _pictures(
    outcomes: ImageOutcomes,
    figures: ClassFigures,
    pairs: Pairs,
    calibration: Calibration,
    names: list[str],
    title: str,
) -> dict[str, bytes]:
    """Draws confusion.png and calibration.png."""
    from utils.inspection import pictures  # matplotlib is slow to import

    if len(names) <= pictures.MATRIX:
        confusion = pictures.draw_matrix(pairs.matrix(len(names)), names, title)
    else:
        confused = pairs.confused()
        top = [
            pictures.Confusion(true, found, n, n / figures.support[true])
            for true, found, n in zip(confused.true, confused.found, confused.images, strict=True)
        ]
        wrong = int((outcomes.found != outcomes.true).sum())
        words = f"{title}, {wrong:,} of them wrong\nthe most confused of {len(names):,} classes"
        confusion = pictures.draw_pairs(top, names, words)
    drawn = pictures.draw_calibration(
        calibration.images, calibration.confidence, calibration.accuracy, calibration.error, title
    )
    return {"confusion.png": confusion, "calibration.png": drawn}


def _worst_picture(
    outcomes: ImageOutcomes,
    shown: np.ndarray,
    images: ImageFolder,
    paths: list[str],
    names: list[str],
    title: str,
) -> bytes:
    """Draws the images of the numbers `shown`, which have the highest loss."""
    from utils.inspection import pictures  # matplotlib is slow to import

    cells = [
        pictures.WorstImage(
            _reread(images, i),
            path,
            int(outcomes.true[i]),
            int(outcomes.found[i]),
            float(outcomes.confidence[i]),
            float(outcomes.true_confidence[i]),
        )
        for i, path in zip(shown, paths, strict=False)
    ]
    return pictures.draw_worst(cells, names, f"the images with the highest loss: {title}")


def _reread(images: ImageFolder, index: int) -> Image.Image | None:
    """Reads an image for the picture; None where it can no longer be read."""
    try:
        image = read_image(images.path(index), "pil")
    except (BrokenImageError, UserError):
        return None
    assert isinstance(image, Image.Image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))  # two dozen photographs are gigabytes
    return image


def _new_folder(parent: Path) -> Path:
    """Makes `parent`/report, or the first of report-2, report-3, … that nobody has made yet.

    Raises:
        UserError: nothing can be made there.
    """
    for number in count(1):
        folder = parent / (FOLDER if number == 1 else f"{FOLDER}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot make it ({error.strerror}); give another --output", EXIT_FAILED
            ) from None
        return folder
    raise AssertionError  # `count` never ends


def _end(text: str, most: int = 40) -> str:
    """Returns a path's last characters: they tell more than the first."""
    return text if len(text) <= most else f"…{text[1 - most :]}"

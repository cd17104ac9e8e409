"""Writes the report of an evaluation: figures by class, confusions, calibration, worst images.

Shares are from 0 to 1 here; the tables have accuracies and probabilities in %, as metrics.csv has,
and an empty cell for a figure that is not defined. Tests compare the figures with scikit-learn's.
"""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from utils.data.decoding import BrokenImageError, read_image
from utils.data.image_folder import ImageFolder
from utils.runs import folder as runs
from utils.runs.checkpoint import Checkpoint
from utils.runs.writer import tool
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.style import MEDIUM_CELL, RIGHT, WRONG, Cell, draw_grid, drawable, plain_name
from utils.system.text import cell, columns, counted, csv_text, printable
from utils.training.classification import ClassificationMeter, ranked
from utils.training.state import wide

if TYPE_CHECKING:
    from utils.data.coco_dataset import CocoSplit
    from utils.data.coco_eval import Result
    from utils.training.detection_data import ValidationSet

BINS = 15  # of the calibration, as in Guo et al. 2017
WHOLE_MATRIX = 1000  # classes up to which confusion.csv is written: beyond, it would be huge
COLUMNS = {
    "classes": "number class support predicted precision recall f1 top1 top5",
    "confused_pairs": "true_number true predicted_number predicted images share_of_true",
    "calibration": "above up_to images confidence accuracy",
    "worst_images": "rank path true predicted probability_of_predicted probability_of_true loss",
}
SAID = (  # on the terminal
    *("class", "support", "objects", "precision", "recall", "f1", "top5"),
    *("box_AP", "box_AP50", "box_recall", "mask_AP", "mask_AP50", "mask_recall"),
)
FEW = 10  # classes that are said of many
LEAST_SCORE = LEAST_IOU = 0.5  # of a detection that counts, and that finds an object
PAIRED = 8  # worst images of a detector in the picture
NONE = -1  # the predicted class where the logits are not finite
FOLDER, SUMMARY = "report", "report.json"
LISTED, DRAWN = 1000, 24  # worst images in the table, and in the picture
TRUE, PATH, DATA = 12, 22, 40  # characters of the true class and the path below it, and of the data


@dataclass(frozen=True)
class EvaluatedImages:
    """Holds the predictions of n images, in the order of the data set."""

    true: np.ndarray  # (n,) int64 classes
    predicted: np.ndarray  # (n,) int64 classes; NONE where the network's output is not finite
    in_top5: np.ndarray  # (n,) bool, the true class is among the five most likely ones
    # (n,) float64 probability of `predicted`, 0 to 1; NaN where there is none
    confidence: np.ndarray
    true_confidence: np.ndarray  # (n,) float64 probability of `true`
    loss: np.ndarray  # (n,) float64 cross-entropy
    outputs: int  # of the network: as many as there are classes, or more

    def __len__(self) -> int:
        return len(self.true)

    def worst(self, most: int) -> np.ndarray:
        """Returns the numbers of the images with the highest loss, the highest first.

        A loss that is no number comes before all others, and of equal ones the first image.
        """
        loss = np.where(np.isfinite(self.loss), self.loss, np.inf)
        return np.argsort(-loss, kind="stable")[:most]


class ReportMeter(ClassificationMeter):
    """Sums as `ClassificationMeter` does, to the last bit, and keeps each image's prediction."""

    def __init__(self, device: torch.device, classes: int):
        super().__init__(device, classes)
        self.rows: list[torch.Tensor] = []  # (N, 6) a batch, on the device
        self.outputs = 0  # of the network

    @torch.no_grad()
    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a batch: its mean loss (scalar), logits (N, C) and targets (N,)."""
        super().update(loss, logits, targets)
        top, hits = ranked(logits, targets, 5)
        logs = F.log_softmax(logits.float(), dim=1)
        true, best = (logs.gather(1, of[:, None])[:, 0] for of in (targets, top[:, 0]))
        finite = logits.isfinite().all(dim=1)
        shares = [value.where(finite, float("nan")) for value in (best.exp(), true.exp(), -true)]
        columns = (targets, top[:, 0].where(finite, NONE), hits.any(dim=1), *shares)
        kind = wide(logits.device)
        self.outputs = logits.shape[1]
        self.rows.append(torch.stack([column.to(kind) for column in columns], dim=1))

    def gathered(self, indices: Sequence[int], images: int) -> EvaluatedImages:
        """Puts the predictions of all ranks in the data set's order. Call it on every rank.

        Args:
            indices: of this rank's images in the data set, in the order of `update`.
            images: in the data set.
        """
        own = torch.cat(self.rows).cpu().numpy() if self.rows else np.zeros((0, 6))
        everywhere = distributed.gather((np.asarray(indices, np.int64), own, self.outputs))
        order = np.concatenate([indices for indices, _, _ in everywhere])
        rows = np.concatenate([rows for _, rows, _ in everywhere])
        each_once = np.array_equal(np.sort(order), np.arange(images))
        assert each_once, order
        rows = rows[np.argsort(order)].T
        confidence, true_confidence, loss = rows[3:].astype(np.float64)
        return EvaluatedImages(
            true=rows[0].astype(np.int64),
            predicted=rows[1].astype(np.int64),
            in_top5=rows[2].astype(bool),
            confidence=confidence,
            true_confidence=true_confidence,
            loss=loss,
            outputs=max(outputs for _, _, outputs in everywhere),  # 0 on a rank without images
        )


@dataclass(frozen=True)
class ClassFigures:
    """Holds figures of C classes, each (C,); NaN where a figure is not defined."""

    support: np.ndarray  # int64, images of the class
    predicted: np.ndarray  # int64, images that the network takes for the class
    # share of `predicted` that is of the class; NaN where nothing was predicted
    precision: np.ndarray
    recall: np.ndarray  # share of `support` that is predicted right. It is the class's top-1, too.
    # harmonic mean of both; NaN where neither an image nor a prediction is of the class
    f1: np.ndarray
    top5: np.ndarray  # share of `support` whose class is among the five most likely ones

    @classmethod
    def of(cls, images: EvaluatedImages, classes: int) -> "ClassFigures":
        """Computes the figures of `classes` classes."""
        number = partial(np.bincount, minlength=classes)
        support = number(images.true)
        right = number(images.true[images.predicted == images.true])
        predicted = number(images.predicted[images.predicted != NONE])
        precision, recall = _share(right, predicted), _share(right, support)
        f1 = _share(2 * right, support + predicted)
        top5 = _share(number(images.true[images.in_top5]), support)
        return cls(support, predicted, precision, recall, f1, top5)

    def means(self) -> dict[str, float]:
        """Returns the means of precision, recall and F1 over the classes that have images.

        A precision without a prediction counts as 0, as scikit-learn's `zero_division=0` has it.
        """
        there = self.support > 0
        names = ("precision", "recall", "f1")
        return {name: float(np.nan_to_num(getattr(self, name)[there]).mean()) for name in names}


def class_pairs(images: EvaluatedImages, classes: int) -> np.ndarray:
    """Returns (p, 3) int64: true class, predicted class and images of each pair that occurs.

    With many classes most never do. Images without a prediction are in none.
    """
    finite = images.predicted != NONE
    codes = images.true[finite] * classes + images.predicted[finite]
    pairs, numbers = np.unique(codes, return_counts=True)
    return np.stack([pairs // classes, pairs % classes, numbers], axis=1)


def confused(pairs: np.ndarray) -> np.ndarray:
    """Returns those of `class_pairs` whose classes differ, the most frequent first."""
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.asarray(wrong[np.argsort(-wrong[:, 2], kind="stable")])


def matrix(pairs: np.ndarray, classes: int) -> np.ndarray:
    """Returns (classes, classes) counts of `class_pairs`: rows are true classes."""
    counts = np.zeros((classes, classes), np.int64)
    counts[pairs[:, 0], pairs[:, 1]] = pairs[:, 2]
    return counts


@dataclass(frozen=True)
class Calibration:
    """Holds how often the network is right where it says how sure it is, in bins of confidence.

    Bin i holds the confidences above i / bins, up to (i + 1) / bins. Images without a prediction
    are in none.
    """

    images: np.ndarray  # (bins,) int64
    confidence: np.ndarray  # (bins,) mean confidence; NaN in an empty bin
    accuracy: np.ndarray  # (bins,) share of the images that is right; NaN in an empty bin

    @classmethod
    def of(cls, images: EvaluatedImages, bins: int = BINS) -> "Calibration":
        """Sorts the images by confidence."""
        finite = images.predicted != NONE
        confidence = images.confidence[finite]
        right = (images.predicted == images.true)[finite]
        edges = np.linspace(0, 1, bins + 1)
        numbers = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
        sums = [np.bincount(numbers, v, minlength=bins) for v in (None, confidence, right)]
        return cls(sums[0].astype(np.int64), _share(sums[1], sums[0]), _share(sums[2], sums[0]))

    @property
    def error(self) -> float:
        """Returns the expected calibration error: Σ images · |accuracy − confidence| / Σ images."""
        return self.mean(np.abs(self.accuracy - self.confidence))

    def mean(self, values: np.ndarray) -> float:
        """Returns the mean of (bins,) values over the images; NaN where there is no prediction."""
        there, n = self.images > 0, self.images.sum()
        return float((self.images * values)[there].sum() / n) if n else float("nan")


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole in float64; NaN where the whole is 0."""
    empty: np.ndarray = np.full(len(whole), np.nan)
    np.divide(part, whole, out=empty, where=whole > 0)
    return empty


@dataclass(frozen=True)
class Report:
    """Holds what a report shows."""

    images: EvaluatedImages  # the predictions
    names: Sequence[str]  # of all classes
    # of the worst images, the worst first, below the folder or inside the shards
    paths: Sequence[str]
    title: str = ""  # of the pictures

    @cached_property
    def figures(self) -> ClassFigures:
        return ClassFigures.of(self.images, len(self.names))

    @cached_property
    def pairs(self) -> np.ndarray:
        return class_pairs(self.images, len(self.names))

    @cached_property
    def calibration(self) -> Calibration:
        return Calibration.of(self.images)

    def tables(self) -> dict[str, bytes]:
        """Returns CSV files: by class, pair and confidence, and the worst images."""
        names, images, by_class = [cell(name) for name in self.names], self.images, self.figures
        shares = (by_class.precision, by_class.recall, by_class.f1, by_class.recall, by_class.top5)
        counts = zip(names, by_class.support, by_class.predicted, strict=True)
        bins = self.calibration
        edges = [_percent(i / len(bins.images)) for i in range(len(bins.images) + 1)]
        measured = [[_percent(v) for v in share] for share in (bins.confidence, bins.accuracy)]
        worst = zip(images.worst(len(self.paths)), self.paths, strict=True)
        named = dict(enumerate(names))  # not NONE
        rows: dict[str, Iterable[Iterable[object]]] = {
            "classes": (
                [i, *row, *(_percent(s[i]) for s in shares)] for i, row in enumerate(counts)
            ),
            "confused_pairs": (
                [true, names[true], other, names[other], n, _percent(n / by_class.support[true])]
                for true, other, n in confused(self.pairs)
            ),
            "calibration": zip(edges[:-1], edges[1:], bins.images, *measured, strict=True),
            "worst_images": (
                [rank, cell(path), names[images.true[i]], named.get(images.predicted[i], "")]
                + [_percent(images.confidence[i]), _percent(images.true_confidence[i])]
                + [_number(images.loss[i])]
                for rank, (i, path) in enumerate(worst, start=1)
            ),
        }
        files = {name: [COLUMNS[name].split(), *lines] for name, lines in rows.items()}
        if len(names) <= WHOLE_MATRIX:
            lines = zip(names, matrix(self.pairs, len(names)).tolist(), strict=True)
            titles = ["true \\ predicted", *names]
            files["confusion"] = [titles, *([name, *line] for name, line in lines)]
        return {f"{name}.csv": csv_text(lines).encode() for name, lines in files.items()}

    def pictures(self, folder: ImageFolder) -> dict[str, bytes]:
        """Draws confusions, calibration and the worst images, which are read from `folder`."""
        from utils.inspection import pictures  # matplotlib is slow to import

        names, bins = self.names, self.calibration
        if len(names) <= pictures.MATRIX:
            drawn = pictures.draw_matrix(matrix(self.pairs, len(names)), names, self.title)
        else:
            wrong = int((self.images.predicted != self.images.true).sum())
            title = f"{self.title}, {wrong:,} of them wrong\nthe most confused of {len(names):,} "
            support = self.figures.support
            top = [(*pair, pair[2] / support[pair[0]]) for pair in confused(self.pairs)]
            drawn = pictures.draw_pairs(top, names, f"{title}classes")
        cells = [
            self._cell(rank, int(i), _reread(folder, int(i)))
            for rank, i in enumerate(self.images.worst(DRAWN), start=1)
        ]
        title = f"the images with the highest loss: {self.title}"
        return {
            "confusion.png": drawn,
            "calibration.png": pictures.draw_calibration(
                bins.images, bins.confidence, bins.accuracy, bins.error, self.title
            ),
            "worst_images.png": draw_grid(cells, title, MEDIUM_CELL),
        }

    def _cell(self, rank: int, i: int, image: Image.Image) -> Cell:
        """Makes a picture of the worst images. Long names and paths are cut; numbers never are."""
        images = self.images
        label, sure = "nothing finite", ""
        if images.predicted[i] != NONE:
            label = plain_name(self.names, images.predicted[i])
            sure = f"predicted with {100 * images.confidence[i]:.1f} %"
        true = plain_name(self.names, images.true[i])
        true = true if len(true) <= TRUE else f"{true[: TRUE - 1]}…"
        share = images.true_confidence[i]
        share = f"{100 * share:.1f} %" if np.isfinite(share) else "-"
        path = _end(drawable(self.paths[rank - 1], "see worst_images.csv"), PATH)
        colour = RIGHT if images.predicted[i] == images.true[i] else WRONG
        return Cell(image, label, f"{sure}\ntrue: {true} ({share})\n{rank}. {path}", colour)

    def summary(self) -> dict[str, Any]:
        """Returns the figures of report.json, in %."""
        return {
            **{f"mean_{name}": 100 * value for name, value in self.figures.means().items()},
            "calibration_error": 100 * self.calibration.error,
            "mean_confidence": 100 * self.calibration.mean(self.calibration.confidence),
            "classes": len(self.names),
            "classes_with_images": int((self.figures.support > 0).sum()),
            "images_without_finite_output": int((self.images.predicted == NONE).sum()),
            "calibration_bins": len(self.calibration.images),
            "class_names": self.names,
        }


def _percent(share: float) -> str:
    return _number(100 * share)


def _number(value: float) -> str:
    """Returns a number with four decimals; "" for one that is not defined."""
    return f"{value:.4f}" if math.isfinite(value) else ""


def write_report(
    parent: Path, images: EvaluatedImages, folder: ImageFolder, arch: str, record: Mapping[str, Any]
) -> Path:
    """Writes a report into `parent`/report, or report-2 and so on where there is one already.

    Args:
        images: the predictions of all images in `folder`.
        record: "images", "top1", "top5" and "loss" as printed, "checkpoint", "data", and the
            environment.

    Returns:
        The report's folder. report.json is its last file: one without it was interrupted.
    """
    names = [printable(name) for name in folder.classes]
    names += [f"class {i}" for i in range(len(names), images.outputs)]
    paths = [printable(folder.paths[i]) for i in images.worst(LISTED)]
    title = f"{arch} on {_end(printable(record['data']), DATA)}"
    title += f", {counted(len(images), 'image', ',')}"
    report = Report(images, names, paths, title)
    files = report.tables() | report.pictures(folder)
    summary = {**record, **report.summary(), "images_root": folder.where, "arch": arch}
    target = new_folder(parent)
    for name, data in files.items():
        write_atomically(target / name, data)
    runs.write_json(target / SUMMARY, summary)
    return target


def _reread(images: ImageFolder, index: int) -> Image.Image:
    """Reads an image for the picture; a grey square where it can no longer be read."""
    try:
        image = read_image(images.path(index), "pil")
    except (BrokenImageError, UserError):
        return Image.new("RGB", (MEDIUM_CELL, MEDIUM_CELL), "#d0d7de")
    assert isinstance(image, Image.Image)
    image.thumbnail((3 * MEDIUM_CELL,) * 2)  # two dozen photographs are gigabytes
    return image


def new_folder(parent: Path) -> Path:
    """Makes `parent`/report, or the first of report-2, report-3, … that nobody has made yet."""
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


def _end(text: str, most: int) -> str:
    """Returns a path's last characters: they tell more than the first."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def own_report_folder(folder: Path) -> Path | None:
    """Returns the folder of the checkpoint's run, None where the checkpoint is in no run's folder.

    Raises:
        UserError: no report can be written there; said before the evaluation.
    """
    if not (folder / runs.LOCK).exists():  # somebody else's folder, and nobody's to write to
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: cannot write a report there (no permission); give --output DIR", EXIT_FAILED
        )
    return folder


def report_lines(folder: Path) -> list[str]:
    """Returns what a report says on the terminal: its classes, its files, and how to see it.

    Of many classes those with the lowest F1 (or AP50, of a detector) are shown.
    """
    rows = list(csv.DictReader((folder / "classes.csv").read_text("utf-8").splitlines()))
    titles = [title for title in SAID if title in rows[0]]
    by = next(title for title in ("f1", "box_AP50") if title in titles)
    there = [row for row in rows if row[titles[1]] != "0"]
    shown = there
    if len(there) > FEW:
        shown = sorted(there, key=lambda row: float(row[by] or 0))[:FEW]
    body = [
        [row["class"], *(f"{float(v):.2f}" if "." in v else v or "-" for v in values)]
        for row in shown
        if (values := [row[title] for title in titles[1:]])
    ]
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    lines = [columns([titles, *body]), f"report written to {folder}: {files}"]
    if len(there) > FEW:
        lines.insert(0, f"the {FEW} of {len(there):,} classes with the lowest {by}:")
    if (folder.parent / "args.json").is_file():
        lines.append(f"  page: {tool('tools.run_report', folder.parent)}")
    return lines


def detection_faults(split: "CocoSplit", results: "list[Result]") -> np.ndarray:
    """Returns (n, 2) of each image: objects that were missed, and false detections.

    Detections with a score of at least 0.5 count, the surest first; each takes the object of its
    class with the highest IoU that is free, if that is at least 0.5.
    """
    from torchvision.ops import box_iou  # slow to import

    label_of = {key: label for label, key in enumerate(split.category_ids)}
    of_image: dict[int, list[Result]] = {}
    for result in sorted(results, key=lambda result: -result["score"]):
        if result["score"] >= LEAST_SCORE:
            of_image.setdefault(result["image_id"], []).append(result)
    faults = np.zeros((len(split), 2), np.int64)
    for number, image_id in enumerate(split.image_ids):
        span = slice(int(split.starts[number]), int(split.starts[number + 1]))
        own = of_image.get(image_id, [])
        boxes = torch.tensor([result["bbox"] for result in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        overlap = box_iou(boxes, torch.from_numpy(split.boxes[span]).to(boxes)).numpy()
        labels = np.array([label_of[result["category_id"]] for result in own], np.int64)
        overlap[labels[:, None] != split.labels[span]] = 0
        for row in overlap:
            if row.size and row.max() >= LEAST_IOU:
                overlap[:, row.argmax()] = 0  # taken
            else:
                faults[number, 1] += 1
        faults[number, 0] = span.stop - span.start - (len(own) - faults[number, 1])
    return faults


def report_detector(
    saved: Checkpoint,
    val: "ValidationSet",
    results: "list[Result]",
    record: Mapping[str, Any],
    output: str | None,
    context: Context,
) -> list[str]:
    """Writes a detector's report below `output`, or beside its run's checkpoint, or in runs/.

    Args:
        record: "images", "data", and COCO's figures.

    Returns:
        Lines to say.
    """
    arch, folder = str(saved.contents["arch"]), Path(output) if output else None
    folder = folder or own_report_folder(saved.file.parent)
    folder = folder or runs.create(runs.run_name(arch, "report"))
    record = {**record, "arch": arch, "checkpoint": str(saved.file), **runs.environment(context)}
    return report_lines(write_detection_report(folder, val, results, record))


def write_detection_report(
    parent: Path,
    val: "ValidationSet",
    results: "list[Result]",
    record: Mapping[str, Any],
) -> Path:
    """Writes a detector's report into `parent`/report, or report-2 and so on, as `write_report`."""
    from utils.data.coco_dataset import load_split
    from utils.data.coco_eval import KINDS
    from utils.inspection import pictures
    from utils.inspection.drawing import draw_predictions

    by_class, title = val.truth.by_class(results), f"{record['arch']}, IoU 0.50"
    boxes = by_class["bbox"]
    names = [printable(name) for name in boxes.names]
    rows: list[list[object]] = [
        [i, cell(name), n] for i, (name, n) in enumerate(zip(names, boxes.objects, strict=True))
    ]
    titles, files = ["number", "class", "objects"], {}
    for kind, figures in by_class.items():
        titles += [f"{KINDS[kind]}_{name}" for name in ("AP", "AP50", "recall")]
        values = np.stack([figures.ap, figures.precision.mean(1), figures.recall], axis=1)
        for row, of_class in zip(rows, values, strict=True):
            row += ["" if value < 0 else _percent(value) for value in of_class]
        drawn = pictures.draw_precision_recall(figures.precision, names, f"{KINDS[kind]}: {title}")
        files[f"{KINDS[kind]}_precision_recall.png"] = drawn
    split = load_split(val.paths)
    faults = detection_faults(split, results)
    worst = np.argsort(-faults.sum(1), kind="stable")[:LISTED]
    lines = (
        [rank, cell(printable(split.file_names[i])), *faults[i]] for rank, i in enumerate(worst, 1)
    )
    head = ["rank", "path", "missed", "false"]
    files["worst_images.csv"] = csv_text([head, *lines]).encode()
    files["classes.csv"] = csv_text([titles, *rows]).encode()
    pairs = worst[:PAIRED].tolist()
    files["worst_images.png"] = draw_predictions(val.paths, val.masks, results, pairs)
    target = new_folder(parent)
    for name, data in files.items():
        write_atomically(target / name, data)
    runs.write_json(target / SUMMARY, record)
    return target

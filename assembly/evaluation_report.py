"""Writes the report of an evaluation: figures by class, confusions, calibration, worst images."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.classification import report_tables
from utils.classification.class_figures import Calibration, ClassFigures, Pairs
from utils.classification.image_outcomes import NONE, ImageOutcomes
from utils.data.decoding import BrokenImageError, read_image
from utils.data.image_folder import ImageFolder
from utils.runs import folder as runs
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.text import printable

FOLDER, SUMMARY = "report", "report.json"
WHOLE_MATRIX = 1000  # classes up to which confusion.csv is written: beyond, it would be huge
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
    files = {
        "classes.csv": report_tables.classes_csv(figures, names),
        "confused_pairs.csv": report_tables.pairs_csv(pairs.confused(), figures.support, names),
        "calibration.csv": report_tables.calibration_csv(calibration),
        "worst_images.csv": report_tables.worst_csv(outcomes, worst, paths, names),
    }
    if len(names) <= WHOLE_MATRIX:
        files["confusion.csv"] = report_tables.confusion_csv(pairs, names)
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
    from utils.inspection import report_pictures  # matplotlib is slow to import

    if len(names) <= report_pictures.MATRIX:
        confusion = report_pictures.draw_matrix(pairs.matrix(len(names)), names, title)
    else:
        confused = pairs.confused()
        top = [
            report_pictures.Confusion(true, found, n, n / figures.support[true])
            for true, found, n in zip(confused.true, confused.found, confused.images, strict=True)
        ]
        wrong = int((outcomes.found != outcomes.true).sum())
        words = f"{title}, {wrong:,} of them wrong\nthe most confused of {len(names):,} classes"
        confusion = report_pictures.draw_pairs(top, names, words)
    measured = (calibration.images, calibration.confidence, calibration.accuracy)
    drawn = report_pictures.draw_calibration(*measured, calibration.error, title)
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
    from utils.inspection import report_pictures  # matplotlib is slow to import

    cells = [
        report_pictures.Judged(
            _reread(images, i),
            path,
            int(outcomes.true[i]),
            int(outcomes.found[i]),
            float(outcomes.confidence[i]),
            float(outcomes.true_confidence[i]),
        )
        for i, path in zip(shown, paths, strict=False)
    ]
    return report_pictures.draw_worst(cells, names, f"the images with the highest loss: {title}")


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

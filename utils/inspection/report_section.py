"""Shows the report of an evaluation (main.py --report) as a part of an HTML page."""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.inspection.html_page import Section, cut, folded, paragraph, picture, table, tiles
from utils.system.errors import UserError

WEAKEST, PAIRS, WORST = 10, 20, 24  # rows that are shown; all of the classes are folded away
LARGEST = 50_000_000  # bytes of a file of a report
SUMMARY = "report.json"
Row = Mapping[str, str]


def newest_report(run: Path) -> Path | None:
    """Returns the run's report with the highest number that was finished; None if there is none."""
    found = []
    for folder in run.glob("report*"):
        number = re.fullmatch(r"report(?:-(\d{1,9}))?", folder.name)
        if number and not folder.is_symlink() and (folder / SUMMARY).is_file():
            found.append((int(number[1] or 1), folder))
    return max(found)[1] if found else None


def report_sections(folder: Path) -> list[Section]:
    """Returns the sections on classes, confusions, calibration and the worst images.

    Raises:
        UserError: a file of the report is missing, or is not what main.py writes.
    """
    try:
        told = json.loads(read_inside(folder / SUMMARY))
        names = [cut(str(name)) or f"class {i}" for i, name in enumerate(told["class_names"])]
        tables = {
            name: rows_of(folder / f"{name}.csv")
            for name in ("classes", "confused_pairs", "worst_images")
        }
        return [
            _classes(told, tables["classes"], names),
            _confusion(folder, tables["confused_pairs"], names),
            _calibration(folder, told),
            _worst(folder, tables["worst_images"]),
        ]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make the report anew") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, csv.Error):
        raise UserError(
            f"{folder}: holds files that main.py --report does not write; move it away, or make "
            "the report anew"
        ) from None


def read_inside(path: Path) -> bytes:
    """Returns a file's bytes. No link is followed: the folder may be one that a stranger packed.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is too large.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{path} is too large")
    return data


def rows_of(path: Path) -> list[Row]:
    """Returns the rows of a CSV file of the report."""
    return list(csv.DictReader(io.StringIO(read_inside(path).decode())))


def picture_of(path: Path, words: str, caption: str = "", wide: bool = False) -> str:
    """Returns a picture of a file, or a note where it is missing."""
    try:
        data = read_inside(path)
    except OSError as error:
        return paragraph(f"{words}: {path.name}: {error.strerror}", "soft")
    return picture(data, words, caption, wide)


def _classes(told: Mapping[str, Any], rows: Sequence[Row], names: Sequence[str]) -> Section:
    head = paragraph(
        f"{told['images']:,} images of {told['data']}, by {told['checkpoint']}. Shares in %.",
        "soft",
    )
    facts = {
        "Top-1": _percent(told["top1"]),
        "Top-5": _percent(told["top5"]),
        "Mean recall": _percent(told["mean_recall"]),
        "Mean precision": _percent(told["mean_precision"]),
        "Mean F1": _percent(told["mean_f1"]),
    }
    titles = ("Class", "Images", "Predicted", "Precision", "Recall", "F1", "Top-5")
    columns = ("support", "predicted", "precision", "recall", "f1", "top5")
    cells = [
        [names[int(row["number"])], *(_short(row[column]) for column in columns)] for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: float(rows[i]["f1"] or "inf"))
    body = head + tiles(facts)
    if len(rows) > WEAKEST:
        body += f"<h3>The {WEAKEST} classes with the lowest F1</h3>"
        body += table(titles, [cells[i] for i in order[:WEAKEST]])
        body += folded(f"All {len(rows):,} classes", table(titles, cells))
    else:
        body += f"<h3>Each class</h3>{table(titles, cells)}"
    return Section("Classes", "classes", body)


def _confusion(folder: Path, rows: Sequence[Row], names: Sequence[str]) -> Section:
    body = picture_of(folder / "confusion.png", "Confusion of classes", wide=True)
    if rows:
        cells = [
            [
                names[int(row["true_number"])],
                names[int(row["found_number"])],
                row["images"],
                _short(row["share_of_true"]),
            ]
            for row in rows[:PAIRS]
        ]
        titles = ("True class", "Found class", "Images", "% of the true class")
        body += f"<h3>Most confused pairs</h3>{table(titles, cells, words=2)}"
    else:
        body += paragraph("No image was taken for another class.")
    return Section("Confusions", "confusions", body)


def _calibration(folder: Path, told: Mapping[str, Any]) -> Section:
    words = (
        f"Expected calibration error {_percent(told['calibration_error'])} over "
        f"{told['calibration_bins']} bins; mean confidence {_percent(told['mean_confidence'])}, "
        f"right answers {_percent(told['top1'])}."
    )
    drawn = picture_of(folder / "calibration.png", "Reliability diagram")
    return Section("Calibration", "calibration", paragraph(words) + drawn)


def _worst(folder: Path, rows: Sequence[Row]) -> Section:
    columns = {
        "path": "Path",
        "true": "True class",
        "found": "Found class",
        "probability_of_found": "Its %",
        "probability_of_true": "True class's %",
        "loss": "Loss",
    }
    cells = [
        [
            row["rank"],
            *(row[c] if c in ("path", "true", "found") else _short(row[c]) for c in columns),
        ]
        for row in rows[:WORST]
    ]
    drawn = picture_of(
        folder / "worst_images.png",
        "The images with the highest loss",
        "Red: another class was found. Wrong labels are often among these images.",
        wide=True,
    )
    listed = folded("The same as a table", table(("", *columns.values()), cells, words=4))
    return Section("Worst images", "worst", drawn + listed)


def _percent(value: object) -> str:
    return f"{value:.2f} %" if isinstance(value, int | float) else "-"


def _end(path: str, most: int = 60) -> str:
    """Returns the end of a path, which tells more than its beginning."""
    return path if len(path) <= most else f"…{path[1 - most :]}"


def _short(value: str) -> str:
    """Returns a number of a CSV file with two decimals; "-" for an empty cell."""
    return f"{float(value):.2f}" if "." in value else value or "-"

"""Weighs classes in the loss: by their numbers of images, or by a user's file."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.data.image_folder import ImageFolder
from utils.system.errors import UserError
from utils.system.small_files import read_json, read_text
from utils.system.text import did_you_mean, printable

BALANCED = "balanced"
WANTED = f"{BALANCED}, or a CSV or JSON file with each class's name and weight"
SHOWN = 3  # names in a message


def class_weights(asked: str, images: ImageFolder) -> tuple[float, ...]:
    """Returns a weight for each class, in the order of labels.

    Args:
        asked: "balanced", or the path of a CSV file (lines of name,weight, with or without a
            heading) or of a JSON file (an object of names and weights).
        images: of training.

    Raises:
        UserError: a class without images cannot be balanced; the file cannot be read, a class is
            missing, unknown or named twice, or a weight is no finite number above 0.
    """
    if asked == BALANCED:
        return _balanced(images)
    is_json = Path(asked).suffix.lower() == ".json"
    named = _pairs_of_json(asked) if is_json else _pairs_of_csv(asked)
    weights: dict[str, float] = {}
    for name, text in named:
        if name not in images.classes:
            hint = did_you_mean(name, images.classes) or f"; {images.where} has no such folder"
            raise UserError(f"{printable(asked)}: no class {printable(name)}{printable(hint)}")
        if name in weights:
            raise UserError(f"{printable(asked)}: class {printable(name)} stands there twice")
        weights[name] = _weight(asked, name, text)
    if lacking := [name for name in images.classes if name not in weights]:
        raise UserError(f"{printable(asked)}: no weight for {_some(lacking)}; name every class")
    return tuple(weights[name] for name in images.classes)


def describe_weights(weights: Sequence[float], classes: Sequence[str]) -> str:
    """Returns one line on the smallest and the largest weight."""
    low, high = int(np.argmin(weights)), int(np.argmax(weights))
    return (
        f"class weights of the loss: {weights[low]:.4g} ({classes[low]}) to "
        f"{weights[high]:.4g} ({classes[high]})"
    )


def _balanced(images: ImageFolder) -> tuple[float, ...]:
    """Returns n / (classes · n of the class): the mean over all images is 1."""
    if empty := images.empty_classes():
        raise UserError(
            f"{images.where}: no images of {_some(empty)}, so --class-weights {BALANCED} has no "
            "weight for it; remove the folder, or give a file of weights"
        )
    counts = np.bincount(images.labels, minlength=len(images.classes))
    return tuple((len(images) / (len(counts) * counts)).tolist())


def _pairs_of_json(file: str) -> list[tuple[str, object]]:
    values = read_json(file, WANTED)
    if not isinstance(values, dict):
        raise UserError(f"{printable(file)}: no object of class names and weights; give {WANTED}")
    return list(values.items())


def _pairs_of_csv(file: str) -> list[tuple[str, object]]:
    text = read_text(file, WANTED)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{printable(file)}: no usable CSV ({error}); give {WANTED}") from None
    for row in rows:
        if len(row) != 2:
            line = printable(",".join(row))[:60]
            raise UserError(f"{printable(file)}: {line!r} is not a class name and a weight")
    if rows and rows[0][1].strip().lower() == "weight":
        rows = rows[1:]
    return [(name, weight.strip()) for name, weight in rows]


def _weight(file: str, name: str, value: object) -> float:
    """Returns a weight as a number, from the text of a CSV file or the number of a JSON file."""
    number = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"{printable(file)}: the weight of {printable(name)}, {printable(str(value))[:40]!r}, "
            "is not a finite number above 0"
        )
    return number


def _some(names: Sequence[str]) -> str:
    shown = printable(", ".join(names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

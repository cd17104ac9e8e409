"""Reads from a checkpoint how its network is to be used: class names, image size, crop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.runs import checkpoint
from utils.system.errors import UserError
from utils.system.text import printable

IMG_SIZE, CROP_PCT = 224, 0.875  # of released weights, which do not say


def class_names(saved: dict, num_classes: int, file: str | None = None) -> list[str]:
    """Returns a name for each of the network's outputs.

    Args:
        saved: a checkpoint; ours hold the names of the class folders.
        num_classes: outputs. Those without a name are called by their number.
        file: one name a line, instead of the checkpoint's.

    Raises:
        UserError: the file cannot be read or has another number of names.
    """
    if file is None:
        names = list(saved.get("classes") or ())
    else:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(
                f"--names {file}: {reason}; give a text file, one name a line"
            ) from None
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != num_classes:
            raise UserError(
                f"--names {file}: {len(names)} names for {num_classes} classes; give one a line, "
                "in the order of the class numbers"
            )
    names = [printable(name) for name in names[:num_classes]]
    return names + [f"class {i}" for i in range(len(names), num_classes)]


def preprocessing(
    saved: dict, img_size: int | None = None, crop_pct: float | None = None
) -> tuple[int, float]:
    """Returns image size and crop, as given or else the checkpoint's, see `eval_transform`."""
    return (
        img_size or saved.get("img_size") or IMG_SIZE,
        crop_pct or saved.get("crop_pct") or CROP_PCT,
    )


def is_detector(saved: dict) -> bool:
    """Returns whether a checkpoint of ours holds a detector."""
    return checkpoint.is_ours(saved) and describes_detector(saved)


def describes_detector(fields: Mapping[str, Any]) -> bool:
    """Returns whether a run's fields, in our checkpoint or its args.json, are a detector's."""
    return "backbone" in fields


def refuse_detector(saved: dict, path: str | Path) -> None:
    """Refuses a detector's checkpoint, for tools that take classifiers alone.

    Raises:
        UserError: `saved` is a detector's checkpoint.
    """
    if is_detector(saved):
        raise UserError(f"{path}: holds a detector; give the checkpoint of a classifier")

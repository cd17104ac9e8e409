"""Holds a checkpoint as a typed value: the file, its fields, and the run that it can continue."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runs import checkpoint, checkpoint_info, schema


@dataclass(frozen=True)
class SavedRun:
    """Holds what a saved run says of itself, for the start that continues it.

    Args:
        recipe: its fields, as the recipe's `as_dict` returned them.
        flags: of its command line, those that a checkpoint keeps.
        seed: of all its random choices.
        epoch: finished epochs.
        step: optimizer steps done in the epoch under way.
        train_images: how many there were; None in old files.
        train_digest: of names and labels of the training images; None in old files.
        pretrained: the file of its first weights, or None.
        cpu_threads: with which it ran; None in old files.
    """

    recipe: Mapping[str, Any]
    flags: Mapping[str, Any]
    seed: int
    epoch: int
    step: int
    train_images: int | None
    train_digest: str | None
    pretrained: str | None
    cpu_threads: int | None

    @property
    def place(self) -> tuple[int, int]:
        """Returns finished epochs, and steps done in the epoch under way."""
        return self.epoch, self.step


@dataclass(frozen=True)
class Checkpoint:
    """Holds a file of weights or of a run, read and checked once.

    Args:
        file: where it was read.
        contents: the whole file, as `models` and `RunState.restore` take it.
        classes: names in the order of the network's outputs; None where the file has none.
        img_size: pixels of a side at evaluation; None where the file does not say.
        crop_pct: part of the image that evaluation keeps; None where the file does not say.
        is_detector: it holds a detector.
        run: None in a file of weights alone.
    """

    file: Path
    contents: dict[str, Any]
    classes: tuple[str, ...] | None
    img_size: int | None
    crop_pct: float | None
    is_detector: bool
    run: SavedRun | None

    @classmethod
    def of(cls, file: Path, contents: dict[str, Any]) -> "Checkpoint":
        """Makes the value of what `checkpoint.load` returned.

        Raises:
            UserError: it is a run, and lacks what training needs to go on.
        """
        run = None
        if checkpoint.is_run(contents):
            schema.check_run(contents, file)
            run = _saved_run(contents)
        ours = contents if checkpoint.is_ours(contents) else {}
        classes = ours.get("classes")
        return cls(
            file,
            contents,
            None if classes is None else tuple(classes),
            ours.get("img_size"),
            ours.get("crop_pct"),
            checkpoint_info.is_detector(contents),
            run,
        )

    @classmethod
    def read(cls, file: Path) -> "Checkpoint":
        """Reads a file; see `checkpoint.load` and `of` for what it refuses."""
        return cls.of(file, checkpoint.load(file))


def _saved_run(contents: Mapping[str, Any]) -> SavedRun:
    progress = contents["progress"]
    threads = contents.get("environment", {}).get("cpu_threads")
    return SavedRun(
        recipe=contents["recipe"],
        flags=contents["args"],
        seed=contents["seed"],
        epoch=progress["epoch"],
        step=progress["step"],
        train_images=contents.get("train_images"),
        train_digest=contents.get("train_digest"),
        pretrained=contents.get("pretrained"),
        cpu_threads=threads if isinstance(threads, int) else None,
    )

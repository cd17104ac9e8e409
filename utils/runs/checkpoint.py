"""Writes and reads checkpoints: plain values and tensors in one file, never fewer than two files.

Reading never runs code from the file (`weights_only=True`), and every byte is checked: torch
itself does not compare a zip's checksums, so a flipped bit would load without a word.
"""

import errno
import io
import pickle
import zipfile
from pathlib import Path

import torch

from utils.runs import claimed_sizes, foreign_files, schema
from utils.runs.safetensors_file import read_safetensors
from utils.system.errors import UserError
from utils.system.files import remove_leftovers, write_atomically

FORMAT = 1
RUN = {"optimizer", "scaler", "progress", "history", "recipe", "args", "seed", "classes"}
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"


class CorruptCheckpointError(UserError):
    """Means that the file is damaged; another checkpoint of the run may be whole."""


def save(path: str | Path, state: dict, retire_to: str | Path | None = None) -> int:
    """Writes `state` atomically (see `write_atomically`) and returns its size in bytes.

    Raises:
        UserError: no room or no permission; an older file at `path` is untouched.
    """
    # In memory first: the size is known before the disk is touched, and a full disk is an OSError
    # here instead of a broken zip stream inside torch.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    data = buffer.getbuffer()
    write_atomically(path, data, retire_to)
    return len(data)


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU: ours, one released by the authors, or a bare state dict.

    Both file formats of torch are read (zip, and the pickle of torch < 1.6), and
    .safetensors.

    Raises:
        CorruptCheckpointError: damaged or cut short.
        UserError: no such file, not a checkpoint, a pickle that wants to run code, one that claims
            far more than its file holds (see `utils.runs.claimed_sizes`), or a field of ours that
            is not of its type (see `utils.runs.schema`).
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give the path of a checkpoint, such as runs/…/{BEST}")
    if path.suffix == ".safetensors":  # torch may read its tensors, and drops all the rest
        state = read_safetensors(path)
        schema.check(state, path)
        return state
    try:
        claimed_sizes.refuse_packed(path)
        if zipfile.is_zipfile(path):
            if (part := _damaged_part(path)) is not None:
                raise CorruptCheckpointError(f"{path}: damaged (checksum of {part})")
        elif path.stat().st_size == 0:
            raise CorruptCheckpointError(f"{path}: damaged (the file is empty)")
        if (reason := foreign_files.why_not_weights(path)) is not None:
            raise UserError(f"{path}: {reason}")
        with foreign_files.inert_types():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(foreign_files.needs_code(path, error)) from None
        raise CorruptCheckpointError(f"{path}: damaged, or not a checkpoint") from None
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a seek to where a damaged offset points
            raise CorruptCheckpointError(f"{path}: damaged, or not a checkpoint") from None
        raise UserError(f"{path}: {error.strerror}; check the file") from None
    except Exception:  # what a damaged file makes torch raise is open-ended
        raise CorruptCheckpointError(f"{path}: damaged, or not a checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    claimed_sizes.refuse_claims(state, path)
    if is_ours(state):
        schema.check(state, path)
    else:
        claimed_sizes.refuse_other_tensors(state, path)
    return state


def is_whole(path: Path) -> bool:
    """Returns whether every byte of one of our own checkpoints is as it was written."""
    try:
        return zipfile.is_zipfile(path) and _damaged_part(path) is None
    except (OSError, zipfile.BadZipFile):
        return False


def is_ours(state: dict) -> bool:
    """Returns whether `load` returned a checkpoint that this project's scripts wrote."""
    return "format" in state and "state_dict" in state


def is_run(state: dict) -> bool:
    """Returns whether training can continue from it: ours, with all that the scripts save."""
    return is_ours(state) and state.keys() >= RUN


class CheckpointFolder:
    """Writes `last`, `previous` and `best` in one folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.last = self.folder / LAST
        self.previous = self.folder / PREVIOUS
        self.best = self.folder / BEST
        self._last_is_good = False  # known only of what this process wrote

    def save_last(self, state: dict) -> None:
        """Writes `last`; the former one becomes `previous`, if it is whole."""
        remove_leftovers(self.folder)
        # A damaged one would push out the only good checkpoint there is.
        keep = self._last_is_good or is_whole(self.last)
        save(self.last, state, retire_to=self.previous if keep else None)
        self._last_is_good = True

    def save_best(self, state: dict) -> None:
        save(self.best, state)

    def newest_good(self, best_first: bool = False) -> tuple[Path, dict, list[str]] | None:
        """Returns the newest checkpoint that can be read: (path, contents, lines on damaged ones).

        Returns None where no checkpoint was written yet.

        Raises:
            UserError: there are some, all of them damaged.
        """
        order = [self.last, self.previous, self.best]
        if best_first:
            order = [self.best, self.last, self.previous]
        notes: list[str] = []
        for path in order:
            if not path.exists():
                continue
            try:
                return path, load(path), notes
            except CorruptCheckpointError as error:
                notes.append(f"! {error}; taking the one before it")
        if notes:
            raise UserError(f"{self.folder}: only damaged checkpoints; start without --resume")
        return None


def _damaged_part(path: Path) -> str | None:
    """Returns the first part of a zip that is not as it was written, or None."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            # The mark of a folder: torch then skips the bytes and returns uninitialised memory.
            if part.external_attr & 0x10:
                return part.filename
        return archive.testzip()

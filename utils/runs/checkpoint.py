"""Writes and reads checkpoints: plain values and tensors in one file, never fewer than two files.

Reading never runs code from the file (`weights_only=True`), and every byte is checked: torch
itself does not compare a zip's checksums, so a flipped bit would load without a word. A stranger's
file may hold anything: types and ranges of our fields are checked, so that a wrong one ends in a
line that names it.
"""

import errno
import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from utils.runs import foreign_files
from utils.runs.foreign_files import FORMAT
from utils.system.errors import UserError
from utils.system.files import read_text, remove_leftovers, write_atomically
from utils.system.text import printable

RUN = {"optimizer", "scaler", "progress", "history", "recipe", "args", "seed", "classes"}
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"
IMG_SIZE, CROP_PCT = 224, 0.875  # of released weights, which do not say
MORE = 4  # times the file's size: what shared tensors and an averaged copy may come to
SLACK = 2**20  # bytes: small files may repeat small tensors
VALUES = 3_000_000  # counted where they stand: a list that is held twice counts twice
HOLDERS = (Tensor, Mapping, list, tuple, set)

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Rate = Annotated[float, Meta(ge=0, le=1e308)]
Number = Whole | float  # it may be infinite, or none
Scalar = bool | Whole | float | str | None
Plain1 = Scalar | list[Scalar] | dict[str, Scalar]
Plain2 = Scalar | list[Plain1] | dict[str, Plain1]
Plains = dict[str, Scalar | list[Plain2] | dict[str, Plain2]]
Kind = TypeVar("Kind", bound=Struct)


class CorruptCheckpointError(UserError):
    """Means that the file is damaged; another checkpoint of the run may be whole."""


class Group(Struct, frozen=True):
    """Holds one group of an optimizer's parameters."""

    lr: Rate
    params: list[Count]
    step: Any = 0  # LAMB's, a number or a tensor

    def __post_init__(self) -> None:
        step = self.step
        if not (isinstance(step, int) or (isinstance(step, Tensor) and step.numel() == 1)):
            raise ValueError("its step is no number")


class Optimizer(Struct, frozen=True):
    """Holds an optimizer's state by the parameters' numbers."""

    state: dict[Count, dict[str, Any]]
    param_groups: list[Group]

    def __post_init__(self) -> None:
        values = [value for part in self.state.values() for value in part.values()]
        if not all(isinstance(value, Tensor | int | float | None) for value in values):
            raise ValueError("its state holds more than tensors and numbers")


class Progress(Struct, frozen=True):
    """Holds where a run stands; see `utils.training.state.RunState`."""

    epoch: Count
    step: Count
    sums: Tensor  # a row a rank
    best: dict[str, Number | dict[str, Any]]
    broken: list[Count]

    def __post_init__(self) -> None:
        if self.sums.ndim != 2:
            raise ValueError("its sums have not two axes")
        if any(isinstance(self.best[k], dict) for k in self.best if k != "summaries"):
            raise ValueError("its best epoch holds more than numbers")
        if self.best and not isinstance(self.best.get("epoch"), int):
            raise ValueError("its best epoch has no number")


class Row(Struct, frozen=True):
    """Holds the number of a finished epoch; its columns are numbers, see `Saved`."""

    epoch: Count


class Saved(Struct, frozen=True, kw_only=True):
    """Describes the fields of our checkpoints, as whoever uses the network reads them.

    Fields that are not known here, as of a later version, are not looked at.
    """

    format: Count
    state_dict: dict[str, Tensor]
    raw_state_dict: dict[str, Tensor] = {}
    averaged_steps: Count = 0
    arch: str = ""
    backbone: str = ""
    attention: str | None = None
    ksize: list[Positive] | None = None
    num_classes: Positive = 1
    model_kwargs: Plains = {}
    parameters: Count = 0
    classes: list[str] | None = None
    category_ids: list[Whole] | None = None
    img_size: Annotated[int, Meta(ge=1, le=2**15)] | None = None
    crop_pct: Annotated[float, Meta(ge=1e-6, le=1)] | None = None
    class_weights: list[Rate] | None = None
    recipe: Plains = {}
    flags: Plains = msgspec.field(name="args", default_factory=dict)
    environment: Plains = {}
    history: list[dict[str, Number]] = []


class SavedRun(Struct, frozen=True, kw_only=True):
    """Holds what a saved run says of itself, for the start that continues it.

    Args:
        recipe: its fields, as the recipe's `as_dict` returned them.
        flags: of its command line, those that a checkpoint keeps.
        seed: of all its random choices.
        train_images: how many there were; None in old files.
        train_digest: of names and labels of the training images; None in old files.
        pretrained: the file of its first weights, or None.
    """

    recipe: Plains
    flags: Plains = msgspec.field(name="args")
    seed: Count
    optimizer: Optimizer
    scaler: dict[str, Number]
    progress: Progress
    history: list[Row]
    train_images: Count | None = None
    train_digest: str | None = None
    pretrained: str | None = None
    environment: Plains = {}

    def __post_init__(self) -> None:
        if self.step and self.train_images is None:  # compared inside an epoch
            raise ValueError("it stopped inside an epoch, and lacks train_images")

    @property
    def epoch(self) -> int:
        """Returns how many epochs are finished."""
        return self.progress.epoch

    @property
    def step(self) -> int:
        """Returns the optimizer steps done in the epoch under way."""
        return self.progress.step

    @property
    def position(self) -> tuple[int, int]:
        """Returns finished epochs, and steps done in the epoch under way."""
        return self.epoch, self.step

    @property
    def cpu_threads(self) -> int | None:
        """Returns with how many threads it ran; None in old files."""
        threads = self.environment.get("cpu_threads")
        return threads if isinstance(threads, int) else None


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
        """Makes the value of what `load` returned.

        Raises:
            UserError: it is a run, and lacks what training needs to go on.
        """
        ours = contents if is_ours(contents) else {}
        classes = ours.get("classes")
        return cls(
            file,
            contents,
            None if classes is None else tuple(classes),
            ours.get("img_size"),
            ours.get("crop_pct"),
            is_detector(contents),
            _checked(contents, SavedRun, file) if is_run(contents) else None,
        )

    @classmethod
    def read(cls, file: Path) -> "Checkpoint":
        """Reads a file; see `load` and `of` for what it refuses."""
        return cls.of(file, load(file))


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
            far more than its file holds, or a field of ours that is not of its type.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give the path of a checkpoint, such as runs/…/{BEST}")
    if (reason := foreign_files.OTHER_ENDINGS.get(path.suffix)) is not None:
        raise UserError(f"{path}: {reason}")
    # torch may read the tensors of .safetensors, and drops all the rest.
    read = foreign_files.read_safetensors if path.suffix == ".safetensors" else _read
    state = read(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    _refuse_claims(state, path)
    if is_ours(state):
        _checked(state, Saved, path)
    return state


def _read(path: Path) -> Any:
    """Reads a file of torch's; see `load`."""
    try:
        zipped = zipfile.is_zipfile(path)
        if path.stat().st_size == 0:
            raise CorruptCheckpointError(f"{path}: damaged (the file is empty)")
        if (reason := foreign_files.why_not_weights(path)) is not None:
            raise UserError(f"{path}: {reason}")
        if zipped and (part := _damaged_part(path)) is not None:
            raise CorruptCheckpointError(f"{path}: damaged (checksum of {part})")
        with foreign_files.inert_types():
            # Mapped, a tensor takes no memory beside the file's, whatever it claims.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
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


def _refuse_claims(contents: Any, path: Path) -> None:
    """Refuses tensors and lists that stand for more than the file can hold (a tensor that repeats
    one number, lists that hold each other), and tensors that fit no network.

    Raises:
        UserError: one line with the tensor's name.
    """
    size = path.stat().st_size
    room, count = MORE * size + SLACK, 0
    waiting: list[tuple[Any, Any]] = [("", contents)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            odd = value.is_meta or value.is_complex() or value.is_quantized
            if odd or value.layout != torch.strided:
                raise UserError(
                    f"{path}: {printable(str(name))} is not a dense tensor of real numbers (it is "
                    "on meta, sparse, complex or quantised); save dense weights"
                )
            claimed = value.numel() * value.element_size()
            room -= claimed
            if room < 0:
                raise UserError(
                    f"{path}: its tensors would fill more than {MORE} times the file's "
                    f"{size / 1e6:,.1f} MB ({printable(str(name))} alone {claimed / 1e6:,.1f} MB); "
                    "save them whole, with .contiguous()"
                )
            continue
        count += len(value)
        if count > VALUES:
            raise UserError(f"{path}: more than {VALUES:,} values; give a file of weights alone")
        named = value.items() if isinstance(value, Mapping) else ((name, part) for part in value)
        waiting += [(key, part) for key, part in named if isinstance(part, HOLDERS)]


def _checked(contents: Mapping[str, Any], kind: type[Kind], path: Path) -> Kind:
    """Returns the typed value of a checkpoint's fields.

    Raises:
        UserError: one line with the file and the field that is missing, not of its type, or out of
            range.
    """
    try:
        return msgspec.convert(contents, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        found = re.search(r"\$\.(.*)`", where)
        field = f"the field {printable(found[1])} " if found else ""
        raise UserError(
            f"{printable(path)}: {field}cannot be used ({what}); give a checkpoint as the scripts "
            "write it"
        ) from None


def is_whole(path: Path) -> bool:
    """Returns whether every byte of one of our own checkpoints is as it was written."""
    try:
        return zipfile.is_zipfile(path) and _damaged_part(path) is None
    except (OSError, UserError, zipfile.BadZipFile):
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
            if part.compress_type != zipfile.ZIP_STORED:  # a few bytes may stand for terabytes
                raise CorruptCheckpointError(
                    f"{path}: damaged, or packed, which torch never does; save it again with "
                    "torch.save in the program that made it"
                )
        return archive.testzip()


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
        lines = read_text(file, "a text file, one name a line").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != num_classes:
            raise UserError(
                f"--names {file}: {len(names)} names for {num_classes} classes; give one a line, "
                "in the order of the class numbers"
            )
    names = [printable(name) for name in names[:num_classes]]
    return names + [f"class {i}" for i in range(len(names), num_classes)]


def preprocessing(
    saved: Mapping[str, Any], img_size: int | None = None, crop_pct: float | None = None
) -> tuple[int, float]:
    """Returns image size and crop, as given or else the checkpoint's, see `eval_transform`."""
    return (
        img_size or saved.get("img_size") or IMG_SIZE,
        crop_pct or saved.get("crop_pct") or CROP_PCT,
    )


def is_detector(saved: dict) -> bool:
    """Returns whether a checkpoint of ours holds a detector."""
    return is_ours(saved) and describes_detector(saved)


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

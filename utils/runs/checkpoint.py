"""Writes and reads checkpoints: plain values and tensors in one file, never fewer than two files.

Reading never runs code from the file (`weights_only=True`), and every byte is checked: torch
itself does not compare a zip's checksums, so a flipped bit would load without a word. A stranger's
file may hold anything: types and ranges of our fields are checked, so that a wrong one ends in a
line that names it.
"""

import dataclasses
import errno
import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from models.attention import is_file, typed_attention
from models.weights import FORMAT, Network, network_from_checkpoint
from utils.data.transforms import Preprocessing
from utils.runs import foreign_files
from utils.system.errors import UserError, as_user_error
from utils.system.files import read_text, remove_leftovers, write_atomically
from utils.system.text import printable

RUN = {"optimizer", "scaler", "progress", "history", "recipe", "args", "seed", "classes"}
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"
MORE = 4  # times the file's size: what shared tensors and an averaged copy may come to
SLACK = 2**20  # bytes: small files may repeat small tensors
VALUES = 3_000_000  # counted where they stand: a list that stands twice counts twice
HOLDERS = (Tensor, Mapping, list, tuple, set)

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Share = Annotated[float, Meta(ge=0, le=1)]
Deviation = Annotated[float, Meta(gt=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=1e308)]
Number = Whole | float  # it may be infinite, or none
Scalar = bool | Whole | float | str | None
Plain1 = Scalar | list[Scalar] | dict[str, Scalar]
Plain2 = Scalar | list[Plain1] | dict[str, Plain1]
Plains = dict[str, Scalar | list[Plain2] | dict[str, Plain2]]
Kind = TypeVar("Kind", bound="Checkpoint")


class CorruptCheckpointError(UserError):
    """Means that the file is damaged; another checkpoint of the run may be whole."""


class Group(Struct, frozen=True):
    """Holds one group of an optimizer's parameters."""

    lr: Rate
    params: list[Count]
    step: Any = None  # LAMB's, a number or a tensor

    def __post_init__(self) -> None:
        step = self.step
        if not isinstance(step, int | None) and not (
            isinstance(step, Tensor) and step.numel() == 1
        ):
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
    """Holds where a run stands; see `utils.training.state.TrainingState`."""

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


class Checkpoint(Struct, frozen=True, kw_only=True):
    """Holds a file of weights, read and checked once; the `SavedRun` of a run is one, too.

    It is the schema of our files as well. Fields that are not known here, as of a later version,
    are not looked at; a file of another program has none of ours.

    Args:
        file: where it was read.
        contents: the whole file, as `models` takes it: ours, a released one, or a state dict.
        format: 0 in files of other programs.
        backbone: of a detector; empty in a classifier's file.
        classes: names in the order of the network's outputs; None where the file has none.
        img_size: pixels of a side at evaluation; None where the file does not say.
        crop_pct: part of the image that evaluation keeps; None where the file does not say.
        interpolation, mean, std: see `Preprocessing`; None where the file does not say.
        recipe: its fields, as the recipe's `as_dict` returned them.
        flags: of its command line, those that a checkpoint keeps.
        history: a row a finished epoch.
    """

    file: Path
    contents: Any
    format: Count = 0
    state_dict: dict[str, Tensor] = {}
    raw_state_dict: dict[str, Tensor] = {}
    averaged_steps: Count = 0
    arch: str = ""
    backbone: str = ""
    attention: str | None = None
    ksize: list[Positive] | None = None
    num_classes: Positive = 1
    model_kwargs: Plains = {}
    parameters: Count = 0
    classes: tuple[str, ...] | None = None
    category_ids: list[Whole] | None = None
    img_size: Annotated[int, Meta(ge=1, le=2**15)] | None = None
    crop_pct: Annotated[float, Meta(ge=1e-6, le=1)] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    mean: tuple[Share, Share, Share] | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    class_weights: list[Rate] | None = None
    recipe: Plains = {}
    flags: Plains = msgspec.field(name="args", default_factory=dict)
    environment: Plains = {}
    history: list[dict[str, Number]] = []

    @staticmethod
    def read(file: Path) -> "Checkpoint":
        """Reads a file; see `load` and `of` for what it refuses."""
        return Checkpoint.of(file, load(file))

    @staticmethod
    def of(file: Path, contents: dict[str, Any]) -> "Checkpoint":
        """Returns the typed value of what `load` returned: a `SavedRun` where training can go on.

        Raises:
            UserError: one line with the field of ours that is missing, not of its type, or out of
                range.
        """
        if not is_ours(contents):
            return Checkpoint(file=file, contents=contents)
        kind = SavedRun if contents.keys() >= RUN else Checkpoint
        return kind.of_fields(file, contents)

    @classmethod
    def of_fields(cls: type[Kind], file: Path, fields: Mapping[str, Any], **more: Any) -> Kind:
        """Returns the typed value of our fields, as of an exported file; `more` are a subclass's.

        Raises:
            UserError: as `of`.
        """
        contents = {"format": FORMAT, "state_dict": {}, **fields}
        try:
            return msgspec.convert({**contents, "file": file, "contents": contents, **more}, cls)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at ")
            path = re.search(r"\$\.(.*)`", where)
            field = f"the field {printable(path[1])} " if path else ""
            raise UserError(
                f"{printable(file)}: {field}cannot be used ({what}); give a checkpoint as the "
                "scripts write it"
            ) from None

    @property
    def run(self) -> "SavedRun | None":
        """Returns the run that can go on; None for weights alone."""
        return None

    @property
    def is_detector(self) -> bool:
        """Returns whether it holds a detector."""
        return bool(self.backbone)

    def refuse_detector(self) -> None:
        """Refuses a detector, for tools that take classifiers alone.

        Raises:
            UserError: it holds a detector.
        """
        if self.is_detector:
            raise UserError(f"{self.file}: holds a detector; give the checkpoint of a classifier")

    def network(self, attention: str | None = None) -> Network:
        """Builds the classifier, with its weights.

        Args:
            attention: a user's own layer, FILE.py:CLASS, as it was typed: the file is run. Without
                effect where it names another attention.

        Raises:
            UserError: the file holds none, or its weights do not fit.
        """
        with as_user_error(f"{self.file}: "):
            own = typed_attention(attention) if is_file(attention or "") else None
            return network_from_checkpoint(self.contents, own)

    def detector(self, **sizes: Any) -> Any:
        """Builds the detector, with its weights.

        Args:
            sizes: min_size and max_size of its images, where they are not the file's own.

        Raises:
            UserError: the file holds none, or its weights do not fit.
        """
        from models.detection.detectors import detector_from_checkpoint  # torchvision is slow

        with as_user_error(f"{self.file}: "):
            return detector_from_checkpoint(self.contents, **sizes)

    def class_names(self, num_classes: int, file: str | None = None) -> list[str]:
        """Returns a name for each of the network's outputs, fit for a terminal.

        Args:
            num_classes: outputs. Those without a name are called by their number.
            file: one name a line, instead of the checkpoint's.

        Raises:
            UserError: the file cannot be read or has another number of names.
        """
        names = list(self.classes or ())
        if file is not None:
            lines = read_text(file, "a text file, one name a line").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            if len(names) != num_classes:
                raise UserError(
                    f"--names {file}: {len(names)} names for {num_classes} classes; give one a "
                    "line, in the order of the class numbers"
                )
        names = [printable(name) for name in names[:num_classes]]
        return names + [f"class {i}" for i in range(len(names), num_classes)]

    def preprocessing(
        self, img_size: int | None = None, crop_pct: float | None = None
    ) -> Preprocessing:
        """Returns how images are prepared: by the arguments, or the file, or as is usual."""
        typed = {"img_size": img_size, "crop_pct": crop_pct}
        return Preprocessing(**{**self.prepared, **{k: v for k, v in typed.items() if v}})

    @property
    def prepared(self) -> dict[str, Any]:
        """Returns what the file says of its images, by the fields of `Preprocessing`."""
        names = [field.name for field in dataclasses.fields(Preprocessing)]
        return {k: v for k in names if (v := getattr(self, k)) is not None}


class SavedRun(Checkpoint, frozen=True, kw_only=True):
    """Holds a run that can go on.

    Args:
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
    history: list[dict[str, Number]]
    train_images: Count | None = None
    train_digest: str | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        epochs = [row.get("epoch") for row in self.history]
        if not all(isinstance(epoch, int) and epoch >= 0 for epoch in epochs):
            raise ValueError("a row of its history lacks the number of its epoch")
        if self.step and self.train_images is None:  # compared inside an epoch
            raise ValueError("it stopped inside an epoch, and lacks train_images")

    @property
    def run(self) -> "SavedRun":
        return self

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


def is_whole(path: Path) -> bool:
    """Returns whether every byte of one of our own checkpoints is as it was written."""
    try:
        return zipfile.is_zipfile(path) and _damaged_part(path) is None
    except (OSError, UserError, zipfile.BadZipFile):
        return False


def is_ours(state: dict) -> bool:
    """Returns whether `load` returned a checkpoint that this project's scripts wrote."""
    return "format" in state and "state_dict" in state


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

    def newest_good(self, best_first: bool = False) -> tuple[Checkpoint, list[str]] | None:
        """Returns the newest checkpoint that can be read, and lines on damaged ones; None where no
        checkpoint was written yet.

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
                return Checkpoint.read(path), notes
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


def describes_detector(fields: Mapping[str, Any]) -> bool:
    """Returns whether a run's fields, in our checkpoint or its args.json, are a detector's."""
    return "backbone" in fields

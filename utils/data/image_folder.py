"""Lists the images in a folder of class folders; labels follow the names of the classes.

Labels follow names, never positions: when `val/` lacks a class of `train/`, the classes behind it
keep their labels. (Numbering the folders of each side by itself shifts them without a word, and
validation accuracy sticks near chance.)
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from utils.data.decoding import EXTENSIONS
from utils.system.errors import UserError
from utils.system.text import counted, did_you_mean, printable

# What systems put beside and into folders of images: archivers, storage boxes, file systems.
SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    "system volume information",
}
OTHER_NAMES = {  # of the folders of DATA, as other programs have them
    "train": ("training", "train_images"),
    "val": ("validation", "valid", "test", "testing", "dev", "eval", "val_images"),
}

Folder = TypeVar("Folder", bound="ImageFolder")


def is_passed_over(name: str) -> bool:
    """Returns whether a file or folder is no part of the data: hidden, or made by a system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


@dataclass(frozen=True)
class ImageFolder:
    """Holds the paths and labels of the images below one folder.

    `paths` are bytes (file names need not be UTF-8) in one numpy array: a Python list of a
    million strings would be copied page by page into every loader worker.
    """

    root: str
    classes: tuple[str, ...]
    paths: np.ndarray  # (n,) bytes, relative to root
    labels: np.ndarray  # (n,) int64 index into classes
    ignored: dict[str, int] = field(default_factory=dict)  # extension → files passed over
    hidden: int = 0  # files and folders that `is_passed_over`
    notes: tuple[str, ...] = ()  # what else a user should know
    part: str = ""  # of the images below root, for people

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def where(self) -> str:
        return printable(self.root) + self.part

    def path(self, index: int) -> Any:
        """Returns an image as `read_image` takes it: a path, or its position in a shard."""
        return os.path.join(os.fsencode(self.root), self.paths[index])

    def take(self: Folder, indices: np.ndarray) -> Folder:
        """Returns some of the images, with the same classes."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices])

    def empty_classes(self) -> list[str]:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return [name for name, n in zip(self.classes, counts, strict=True) if n == 0]


def list_classes(root: str) -> list[str]:
    """Returns the names of the class folders below `root`, sorted.

    Raises:
        UserError: no such folder, or no folder in it.
    """
    if not os.path.isdir(root):
        parent = os.path.dirname(os.path.abspath(root))
        siblings = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
        name = os.path.basename(os.path.normpath(root))
        known = (name, *OTHER_NAMES.get(name, ()))
        hint = did_you_mean(name, siblings)
        if other := [sibling for sibling in siblings if sibling.lower() in known]:
            hint = f"; there is {printable(other[0])}: rename it to {name}"
        layout = (
            "; DATA holds train/ and val/, each with one folder per class (of class folders alone, "
            "--val-split 0.2 takes a part for val)"
        )
        raise UserError(f"{printable(root)}: no such folder{hint or layout}")
    if not (names := _folders(root)):
        raise UserError(f"{printable(root)}: holds no class folders; put one folder per class in")
    return names


def scan(root: str, classes: Sequence[str] | None = None) -> ImageFolder:
    """Lists the images of every class folder below `root`, sub-folders included, sorted.

    Args:
        root: the folder that holds the class folders.
        classes: the class names in label order; by default the folders of `root`, sorted.

    Raises:
        UserError: a missing folder, a folder that `classes` does not name, a link that leads back
            into itself, or no image at all.
    """
    folders = list_classes(root)
    classes = tuple(folders if classes is None else classes)
    label_of = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in folders if name not in label_of]:
        raise UserError(
            f"{printable(root)}: {count_names(unknown)} not among the {len(classes)} known "
            "classes; rename or move these folders (labels go by folder name)"
        )
    paths: list[bytes] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    beside = os.listdir(root)
    hidden = sum(map(is_passed_over, beside))
    for name in folders:
        before = len(paths)
        hidden += _collect(root, name, paths, ignored, (os.path.realpath(root),))
        paths[before:] = sorted(paths[before:])
        labels += [label_of[name]] * (len(paths) - before)
    if not paths:
        passed = f" ({_counts(ignored)} passed over)" if ignored else ""
        raise UserError(
            f"{printable(root)}: no image in {len(folders)} class folders{passed}; "
            f"known endings are {' '.join(EXTENSIONS)}"
        )
    return ImageFolder(
        root=root,
        classes=classes,
        paths=np.array(paths),
        labels=np.array(labels, dtype=np.int64),
        ignored=dict(ignored),
        hidden=hidden,
        notes=tuple(_notes(root, folders, beside)),
    )


def split(images: ImageFolder, share: float) -> tuple[ImageFolder, ImageFolder]:
    """Divides the images of each class by a hash of their names, into train and val.

    The same names give the same parts, on every machine and with every seed.

    Args:
        share: of each class's images that go to val.

    Raises:
        UserError: a class would have no image in one of them.
    """
    counts = np.bincount(images.labels, minlength=len(images.classes))
    to_val = np.round(counts * share).astype(np.int64)
    if lacking := [
        name for name, n, v in zip(images.classes, counts, to_val, strict=True) if v in (0, n)
    ]:
        raise UserError(
            f"{images.where}: --val-split {share:g} leaves no image for train or for val of "
            f"{count_names(lacking)}; add images, or give another share"
        )
    hashes = [hashlib.sha256(path).digest()[:8] for path in images.paths.tolist()]
    order = np.lexsort((np.array(hashes), images.labels))
    rank = np.empty(len(order), np.int64)  # of each image in its class
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_val = rank < to_val[images.labels]
    said = f", --val-split {share:g}"
    train = replace(images.take(np.flatnonzero(~in_val)), part=f"{said}: the others")
    val = images.take(np.flatnonzero(in_val))
    return train, replace(
        val, part=f"{said}: {share:.0%} of each class, by name", ignored={}, hidden=0, notes=()
    )


def describe(folder: ImageFolder, title: str) -> list[str]:
    """Returns lines for the report at the start of a run: counts, and what a user should check."""
    present = len(folder.classes) - len(folder.empty_classes())
    lines = [
        f"{title}: {counted(len(folder), 'image', ',')} in {counted(present, 'class')} "
        f"({folder.where})"
    ]
    if len(folder.classes) == 1:
        lines.append("  ! one class alone: nothing to tell apart, and top-1 is always 100 %")
    if empty := folder.empty_classes():
        lines.append(f"  ! no {title} image for {count_names(empty)}")
    if folder.ignored:
        lines.append(f"  ! passed over: {_counts(folder.ignored)}")
    if folder.hidden:
        lines.append(f"  ! passed over: {folder.hidden} hidden (.name) or system entries")
    return lines + [f"  ! {note}" for note in folder.notes]


def _notes(root: str, folders: Sequence[str], beside: Sequence[str]) -> list[str]:
    """Returns what a user should check in a folder whose class folders are `folders`."""
    notes = []
    stray = [name for name in sorted(beside) if name.lower().endswith(EXTENSIONS)]
    if stray := [name for name in stray if not is_passed_over(name) and name not in folders]:
        notes.append(
            f"passed over: {counted(len(stray), 'image')} directly in {printable(root)} "
            f"({printable(stray[0])}), in no class folder"
        )
    if len(folders) == 1:
        where = os.path.join(root, folders[0])
        if inner := _folders(where):
            notes.append(
                f"the folders in {printable(where)} look like classes: {count_names(inner)}; move "
                f"them up, into {printable(root)}"
            )
    return notes


def files_below(root: str) -> Iterator[tuple[bytes, str]]:
    """Yields path and ending of each file below `root`, but for hidden and systems' entries.

    A folder to which several links lead is entered once, so that links in a circle end.

    Raises:
        UserError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        where = printable(error.filename or root)
        raise UserError(f"{where}: {error.strerror}; check its permissions")

    seen = {os.path.realpath(os.fsencode(root))}
    for folder, folders, files in os.walk(os.fsencode(root), onerror=refuse, followlinks=True):
        inside, folders[:] = sorted(folders), []
        for name in inside:
            target = os.path.realpath(os.path.join(folder, name))
            if not is_passed_over(os.fsdecode(name)) and target not in seen:
                seen.add(target)
                folders.append(name)
        for name in files:
            if not name.startswith(b"."):
                yield os.path.join(folder, name), os.fsdecode(os.path.splitext(name)[1]).lower()


def _folders(path: str) -> list[str]:
    return sorted(e.name for e in _entries(path) if _is_folder(e) and not is_passed_over(e.name))


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror}; check its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # of a link that leads nowhere it is False; of one to itself, this
        raise UserError(f"{printable(entry.path)}: {error.strerror}; see to it") from None


def _collect(
    root: str, folder: str, paths: list[bytes], ignored: Counter[str], above: tuple[str, ...]
) -> int:
    """Adds the images below root/folder to `paths`; returns the number of hidden entries."""
    here = os.path.realpath(os.path.join(root, folder))
    if here in above:
        raise UserError(
            f"{printable(os.path.join(root, folder))}: a link that leads back to a folder above "
            "it; remove the link"
        )
    hidden = 0
    for entry in _entries(os.path.join(root, folder)):
        relative = os.path.join(folder, entry.name)
        if is_passed_over(entry.name):
            hidden += 1
        elif _is_folder(entry):
            hidden += _collect(root, relative, paths, ignored, (*above, here))
        elif entry.name.lower().endswith(EXTENSIONS):
            paths.append(os.fsencode(relative))
        else:
            ignored[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
    return hidden


def count_names(names: Sequence[str], most: int = 5) -> str:
    """Returns how many classes there are, and the first of their names, as text."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{counted(len(names), 'class')} ({printable(', '.join(names[:most]))}{more})"


def _counts(ignored: dict[str, int]) -> str:
    return ", ".join(f"{n} {ext}" for ext, n in sorted(ignored.items(), key=lambda x: -x[1]))

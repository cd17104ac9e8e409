"""Lists the images in a folder of class folders; labels follow the names of the classes.

Labels follow names, never positions: when `val/` lacks a class of `train/`, the classes behind it
keep their labels. (Numbering the folders of each side by itself shifts them without a word, and
validation accuracy sticks near chance.)
"""

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from utils.data.decoding import EXTENSIONS
from utils.system.errors import UserError
from utils.system.text import counted, did_you_mean, printable

# What systems put beside and into folders of images: archivers, storage boxes, file systems.
SYSTEM_FOLDERS = {
    "__macosx",
    "@eadir",
    "@tmp",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}
OTHER_NAMES = {  # of the folders of DATA, as other programs have them
    "train": ("training", "train_images"),
    "val": ("validation", "valid", "test", "testing", "dev", "eval", "val_images"),
}


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

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def where(self) -> str:
        return printable(self.root)

    def path(self, index: int) -> bytes:
        return os.path.join(os.fsencode(self.root), self.paths[index])

    def take(self, indices: np.ndarray) -> "ImageFolder":
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
        siblings = os.listdir(parent) if os.path.isdir(parent) else []
        name = os.path.basename(os.path.normpath(root))
        hint = _by_another_name(name, parent) or did_you_mean(name, siblings)
        layout = "; DATA holds train/ and val/, each with one folder per class"
        raise UserError(f"{printable(root)}: no such folder{hint or layout}")
    with _scandir(root) as entries:
        names = sorted(e.name for e in entries if _is_folder(e) and not is_passed_over(e.name))
    if not names:
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
    found = list_classes(root)
    classes = list(found if classes is None else classes)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        known = {name.lower(): name for name in classes}
        cases = [f"{n} is {known[n.lower()]} there" for n in unknown if n.lower() in known]
        but = f" ({printable(', '.join(cases[:5]))}: only the case differs)" if cases else ""
        raise UserError(
            f"{printable(root)}: {count_names(unknown)} not among the {len(classes)} known "
            f"classes{but}; rename or move these folders (labels go by folder name)"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    paths: list[bytes] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    beside = os.listdir(root)
    hidden = sum(map(is_passed_over, beside))
    for name in found:
        before = len(paths)
        hidden += _collect(root, name, paths, ignored, (os.path.realpath(root),))
        paths[before:] = sorted(paths[before:])
        labels += [label_of[name]] * (len(paths) - before)
    if not paths:
        passed = f" ({_counts(ignored)} passed over)" if ignored else ""
        raise UserError(
            f"{printable(root)}: no image in {len(found)} class folders{passed}; "
            f"known endings are {' '.join(EXTENSIONS)}"
        )
    return ImageFolder(
        root=root,
        classes=tuple(classes),
        paths=np.array(paths),
        labels=np.array(labels, dtype=np.int64),
        ignored=dict(ignored),
        hidden=hidden,
        notes=tuple(_notes(root, found, beside)),
    )


def find_images(root: str) -> list[bytes]:
    """Returns the paths, relative to `root`, of all images below it, found as `scan` finds them.

    Raises:
        UserError: a folder that cannot be read, or a link that leads back into itself.
    """
    paths: list[bytes] = []
    _collect(root, "", paths, Counter(), ())
    return sorted(paths)


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


def _by_another_name(name: str, parent: str) -> str:
    """Returns a remedy where `name` is missing and another folder clearly plays its part."""
    if not os.path.isdir(parent):
        return ""
    folders = sorted(n for n in os.listdir(parent) if os.path.isdir(os.path.join(parent, n)))
    cases = [n for n in folders if n.lower() == name.lower()]
    others = [n for n in folders if n.lower() in OTHER_NAMES.get(name, ())]
    if not cases + others:
        return ""
    found = (cases + others)[0]
    why = ", which differs in case" if cases else ""
    return f"; there is {printable(found)}{why}: rename it to {name}, or make a link of that name"


def _notes(root: str, found: Sequence[str], beside: Sequence[str]) -> list[str]:
    """Returns what a user should check in a folder whose class folders are `found`."""
    notes, classes = [], set(found)
    stray = [name for name in beside if name not in classes and name.lower().endswith(EXTENSIONS)]
    if stray := [name for name in stray if not is_passed_over(name)]:
        notes.append(
            f"passed over: {len(stray)} image{'s' * (len(stray) > 1)} directly in "
            f"{printable(root)} ({printable(sorted(stray)[0])}), in no class folder"
        )
    lower = Counter(name.lower() for name in found)
    if twins := [name for name in found if lower[name.lower()] > 1]:
        notes.append(f"{count_names(twins)} differ in case only, and are different classes here")
    if len(found) == 1:
        with _scandir(os.path.join(root, found[0])) as entries:
            inner = sorted(e.name for e in entries if _is_folder(e) and not is_passed_over(e.name))
        if inner:
            where = printable(os.path.join(root, found[0]))
            notes.append(
                f"the folders in {where} look like classes: {count_names(inner)}; move them up, "
                f"into {printable(root)}"
            )
    return notes


def _scandir(path: str):
    try:
        return os.scandir(path)
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror}; check its permissions") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # of a link that leads nowhere it is False; of one to itself, this
        if error.errno == errno.ELOOP:
            raise _leads_back(entry.path) from None
        raise UserError(f"{printable(entry.path)}: {error.strerror}; see to it") from None


def _leads_back(path: str | bytes) -> UserError:
    return UserError(
        f"{printable(path)}: a link that leads back to a folder above it, or to itself; remove the "
        "link"
    )


def _collect(
    root: str, folder: str, paths: list[bytes], ignored: Counter[str], above: tuple[str, ...]
) -> int:
    """Adds the images below root/folder to `paths`; returns the number of hidden entries."""
    here = os.path.realpath(os.path.join(root, folder))
    if here in above:
        raise _leads_back(os.path.join(root, folder))
    hidden = 0
    with _scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
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
    shown = ", ".join(printable(n) for n in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({shown}{more})"


def _counts(ignored: dict[str, int]) -> str:
    return ", ".join(f"{n} {ext}" for ext, n in sorted(ignored.items(), key=lambda x: -x[1]))

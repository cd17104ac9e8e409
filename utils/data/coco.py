"""Reads and checks COCO annotations.

What is wrong (an id that leads nowhere, a field of another type) ends a run with one line, and
`check_file` lists all of it. What alone cannot be trained on is counted and said.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from utils.data import coco_masks
from utils.data.coco_masks import NUMBERS, is_finite
from utils.system.errors import UserError
from utils.system.text import counted, printable

MOST_PIXELS = 2**31 - 1  # COCO's mask routines count pixels in 32 bits
LONGEST_SHOWN = 120  # characters of a name in a message
MIN_SIDE = 1.0  # pixels that a box must have on each side after clipping
MANY_CUT = 0.1  # share of boxes that reach out of their images from which on it is said
CROWD = "a crowd under one box"
SMALL = f"box under {MIN_SIDE:g} pixel, or outside the image"
FRACTIONS = "box under 1 pixel, with all its numbers from 0 to 1"

Entry = TypeVar("Entry")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


@dataclass(frozen=True)
class CocoPaths:
    """Holds a split's folder of images and its annotation file."""

    part: str  # "train" or "val", as in the flags
    images: Path
    annotations: Path
    anywhere: bool = False  # images may lie outside of the folder, by links, `..` or absolute names


def locate(
    root: str | Path,
    part: str,
    images: str | None = None,
    annotations: str | None = None,
    anywhere: bool = False,
) -> CocoPaths:
    """Returns where the split `part` ("train" or "val") of the data folder `root` is.

    Args:
        images: another name for `{part}2017`, in `root` or absolute.
        annotations: another name for `annotations/instances_{part}2017.json`.

    Raises:
        UserError: one of them does not exist.
    """
    folder = Path(root, images or f"{part}2017")
    file = Path(root, annotations or f"annotations/instances_{part}2017.json")
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; give the one that holds {part}2017/")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name another with --{part}-images")
    if not file.is_file():
        raise UserError(f"{file}: no such file; name another with --{part}-annotations")
    return CocoPaths(part, folder, file, anywhere)


class Image(msgspec.Struct):
    """Holds what an entry of the list "images" must have; sizes are in pixels."""

    id: int  # of any size, which numpy's integers are not
    file_name: str
    height: Annotated[int, msgspec.Meta(ge=1)]
    width: Annotated[int, msgspec.Meta(ge=1)]


class Category(msgspec.Struct):
    """Holds what an entry of the list "categories" must have."""

    id: int
    name: Any


class Annotation(msgspec.Struct):
    """Holds what is read of an object; a bad box, area or mask is counted where it is used."""

    image_id: int
    category_id: int
    bbox: Any
    id: Any = msgspec.UNSET
    iscrowd: Annotated[float, msgspec.Meta(ge=0, le=1, multiple_of=1)] | bool | None = None
    area: Any = None
    segmentation: Any = None


class Lists(msgspec.Struct, Generic[Entry]):
    """Holds a COCO file's three lists, with their entries not yet read."""

    images: list[Entry]
    categories: list[Entry]
    annotations: list[Entry] = []  # absent for COCO's test images


class CocoFile:
    """Reads an annotation file; checks its entries' types, their ids and the classes' names.

    Entries are read one by one from the file's bytes: as Python's objects a million annotations
    would take gigabytes.

    Args:
        paths: the annotations and the folder of images.
        strict: end with the first fault; else note each in `faults` and leave its entry out.

    Attributes:
        images: those that can be used, by id, in the file's order.
        categories: id to name, by id.
        faults: (path of an image, or of the annotations; what is wrong), in the file's order.

    Raises:
        UserError: no such file, no JSON with COCO's lists, or `strict` and a fault.
    """

    def __init__(self, paths: CocoPaths, strict: bool = True):
        self.paths, self.strict = paths, strict
        self.faults: list[tuple[str, str]] = []
        lists = _read_lists(paths.annotations)
        self._objects = lists.annotations
        self.images: dict[int, Image] = {}
        self._read_images(lists.images)
        self.categories = dict(sorted(self._read_categories(lists.categories).items()))

    def objects(self) -> Iterator[tuple[Annotation, Image]]:
        """Yields each object of a known image and class, and the image.

        Its `id`, where it has none, becomes its position in the list.
        """
        for number, entry in self._typed("annotations", self._objects, Annotation):
            if entry.id is msgspec.UNSET:
                entry.id = f"[{number}]"
            name = f"annotation {shown(entry.id)}"
            image = self.images.get(entry.image_id)
            if image is None:
                self.fault(f"{name}: unknown image_id {entry.image_id}")
            elif entry.category_id not in self.categories:
                self.fault(f"{name}: unknown category_id {entry.category_id}", image)
            else:
                yield entry, image

    def fault(self, reason: str, image: Image | None = None, remedy: str = "mend it") -> None:
        """Notes a fault of an image, or of the file itself, or ends with it."""
        if self.strict:
            where = f"{shown(image.file_name)}: " if image else ""
            raise UserError(f"{self.paths.annotations}: {where}{reason}; {remedy}")
        file = self.paths.images / shown(image.file_name) if image else self.paths.annotations
        self.faults.append((str(file), reason))

    def _typed(
        self, part: str, entries: Sequence[Any], kind: type[Entry]
    ) -> Iterator[tuple[int, Entry]]:
        """Yields the position and the value of each entry that has the right types."""
        for number, raw in enumerate(entries):
            try:
                if isinstance(raw, msgspec.Raw):
                    yield number, msgspec.json.decode(raw, type=kind)
                else:
                    yield number, msgspec.convert(raw, kind)
            except msgspec.DecodeError as error:
                what, _, where = str(error).partition(" - at `$")
                self.fault(f"{part}[{number}]{where.rstrip('`')}: {what}")

    def _read_images(self, entries: Sequence[Any]) -> None:
        names: dict[str, int] = {}
        if not entries:
            self.fault("the list 'images' is empty")
        for _, image in self._typed("images", entries, Image):
            parts = image.file_name.split("/")
            if image.height * image.width > MOST_PIXELS:
                most = f"{MOST_PIXELS:,} pixels, which is more than can be read"
                self.fault(f"height and width say more than {most}", image)
            elif not self.paths.anywhere and (not parts[0] or ".." in parts):
                self.fault(
                    "a file_name must lie in the folder of images, without '..' and without a '/' "
                    "at its start",
                    image,
                    "write it so, or give --images-anywhere",
                )
            elif (other := self.images.setdefault(image.id, image)) is not image:
                self.fault(f"id {image.id}, which {shown(other.file_name)} has, too", image)
            if image.file_name in names and not self.strict:  # no fault of a run
                both = f"{names[image.file_name]} and {image.id}"
                self.fault(f"images {both} are of one file", image)
            names.setdefault(image.file_name, image.id)

    def _read_categories(self, entries: Sequence[Any]) -> dict[int, str]:
        names: dict[int, str] = {}
        if not entries:
            self.fault("the list 'categories' is empty")
        for _, category in self._typed("categories", entries, Category):
            key, name = category.id, str(category.name)
            if key in names:
                self.fault(f"categories {shown(names[key])} and {shown(name)} have the id {key}")
            elif name in names.values():
                twice = f"two categories are named {shown(name)}"
                self.fault(twice, remedy="rename one: classes are told apart by their names")
            names[key] = name
        return names


def _read_lists(path: Path) -> Lists[Any]:
    try:
        text = path.read_bytes()
        try:
            return msgspec.json.decode(text, type=Lists[msgspec.Raw])
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Python's own reads what is no JSON and yet written: NaN, half a surrogate pair, a BOM
            return msgspec.convert(json.loads(text), Lists[Any])
    except msgspec.ValidationError as error:
        needed = "lists of images, categories and annotations are needed"
        raise UserError(f"{path}: no COCO annotations: {error}; {needed}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); write it again") from None


def shown(name: object) -> str:
    """Returns a name from a stranger's file, fit for a line of a message."""
    text = printable(str(name).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def box_fault(box: Any) -> str | None:
    """Returns why a value from JSON is not COCO's [x, y, w, h], or None if it is."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in NUMBERS for v in box):
        return "box is not four numbers"
    return None if all(map(is_finite, box)) else "box is not finite"


def usable_box(
    entry: Annotation, image: Image, masks: bool = False, crowds: bool = True
) -> Box | str:
    """Returns an object's box inside the image, or why the object is of no use.

    Args:
        masks: it must have a mask with a pixel, too, which lies where the box is.
        crowds: groups marked iscrowd, whose one box is around many objects, are of use.
    """
    if entry.iscrowd and not crowds:
        return CROWD
    if reason := box_fault(entry.bbox):
        return reason
    x, y, w, h = entry.bbox
    box = max(x, 0), max(y, 0), min(x + w, image.width), min(y + h, image.height)
    if box[2] - box[0] < MIN_SIDE or box[3] - box[1] < MIN_SIDE:
        return FRACTIONS if all(0 <= value <= 1 for value in entry.bbox) else SMALL
    size = image.height, image.width
    return (masks and coco_masks.mask_fault(entry.segmentation, *size, box)) or box


class ObjectNotes:
    """Counts objects of no use, by reason, and boxes that reach out by a pixel or more."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self.boxes = self.cut = 0

    def drop(self, reason: str, image: Image) -> None:
        """Counts an object that is of no use."""
        self.counts[reason] += 1
        self._first.setdefault(reason, shown(image.file_name))

    def use(self, box: Sequence[float], image: Image) -> None:
        """Counts a box [x, y, w, h] that can be used."""
        x, y, w, h = box
        self.boxes += 1
        self.cut += min(x, y, image.width - x - w, image.height - y - h) <= -1

    def lines(self, start: str, end: str = "") -> list[str]:
        """Returns a line for each reason, and one where many boxes reach out of their images.

        Args:
            start, end: what they begin with, "{}" for "3 objects", and what follows the cut boxes.
        """
        lines = [
            f"{start.format(counted(n, 'object', ','))}: {reason} (first in {self._first[reason]})"
            for reason, n in self.counts.items()
        ]
        return lines + [f"  ! {cut}" for cut in self.cut_line(end)]

    def cut_line(self, end: str = "") -> list[str]:
        """Returns a line where many boxes reach out of their images, as x1, y1, x2, y2 do."""
        if not self.cut or self.cut < MANY_CUT * self.boxes:
            return []
        return [
            f"{self.cut:,} of {self.boxes:,} boxes reach out of their images{end}: bbox must be "
            "x, y, width, height, not x1, y1, x2, y2"
        ]

    def refusal(self, annotations: Path) -> UserError:
        """Returns the error of a run that has no object to train on."""
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.items())
        remedy = "python -m tools.check_images DATA lists them"
        if not reasons:
            reasons = "the list 'annotations' is empty"
            remedy = "add objects, or name another file with --train-annotations"
        elif all(reason.startswith("mask") for reason in self.counts):
            remedy = "mend them, or train faster_rcnn or retinanet, which need boxes alone"
        return UserError(f"{annotations}: no object to train on: {reasons}; {remedy}")


def counts_line(name: str, images: int, empty: int, objects: int, classes: int) -> str:
    """Returns the first line of a report on COCO data."""
    note = f", {empty:,} of them without objects" if empty else ""
    of_classes = f"{counted(objects, 'object', ',')} of {counted(classes, 'class')}"
    return f"{name}: {counted(images, 'image', ',')}{note}, {of_classes}"


def check_file(paths: CocoPaths) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]]]:
    """Looks through an annotation file from its first entry to its last.

    Returns:
        Height and width of each image by its file name, where its entry can be used; and all that
        is wrong, see `CocoFile.faults`.

    Raises:
        UserError: the file is no JSON with COCO's lists.
    """
    file = CocoFile(paths, strict=False)
    notes = ObjectNotes()
    for entry, image in file.objects():
        box = usable_box(entry, image, masks=entry.segmentation is not None)
        if isinstance(box, str):
            file.fault(f"annotation {shown(entry.id)}: {box}", image)
        else:
            notes.use(entry.bbox, image)
    for line in notes.cut_line():
        file.fault(line)
    sizes = {image.file_name: (image.height, image.width) for image in file.images.values()}
    return sizes, file.faults

"""Finds a COCO split on disk and reads its annotations, with their types and ids checked.

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
from utils.system.text import printable

CROWDS = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}  # True == 1 == 1.0
MOST_PIXELS = 2**31 - 1  # COCO's mask routines count pixels in 32 bits
LONGEST_SHOWN = 120  # characters of a name in a message
MIN_SIDE = 1.0  # pixels that a box must have on each side after clipping
MANY_CUT = 0.1  # share of boxes that reach out of their images from which on it is said
CROWD = "a crowd under one box"
NOT_FOUR = "box is not four numbers"
SMALL = f"box under {MIN_SIDE:g} pixel, or outside the image"
FRACTIONS = "box under 1 pixel, with all its numbers from 0 to 1"
IN_PIXELS = "write bbox as x, y, width, height in pixels"
NEEDS_MASKS = "add polygons, or train faster_rcnn or retinanet, which need boxes alone"
REMEDIES = {  # reason -> what to do where no object is left
    CROWD: "write iscrowd 0 for single objects",
    coco_masks.NO_POLYGON: NEEDS_MASKS,
    coco_masks.NO_RUNS: NEEDS_MASKS,
    coco_masks.NO_PIXEL: NEEDS_MASKS,
    coco_masks.BARE_RUNS: 'write {"size": [height, width], "counts": […]}',
    coco_masks.ELSEWHERE: "write the corners of polygons as x, y, x, y in pixels",
}

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class CocoPaths:
    """Holds a split's folder of images and its annotation file.

    Args:
        part: "train" or "val", as in the flags.
        anywhere: images may lie outside of the folder, by links, `..` or absolute names.
    """

    part: str
    images: Path
    annotations: Path
    anywhere: bool = False


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
        anywhere: as in `CocoPaths`.

    Raises:
        UserError: one of them does not exist.
    """
    root = Path(root)
    paths = CocoPaths(
        part,
        root / (images or f"{part}2017"),
        root / (annotations or f"annotations/instances_{part}2017.json"),
        anywhere,
    )
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that holds {part}2017/")
    if not paths.images.is_dir():
        raise UserError(f"{paths.images}: no such folder; name another with --{part}-images")
    if not paths.annotations.is_file():
        raise UserError(
            f"{paths.annotations}: no such file; name another with --{part}-annotations"
        )
    return paths


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
    iscrowd: Any = None
    area: Any = None
    segmentation: Any = None


class Lists(msgspec.Struct, Generic[Entry]):
    """Holds a COCO file's three lists, with their entries not yet read."""

    images: list[Entry]
    categories: list[Entry]
    annotations: list[Entry] | msgspec.UnsetType = msgspec.UNSET


class CocoFile:
    """Reads an annotation file; checks its entries' types, their ids and the classes' names.

    Entries are read one by one from the file's bytes: as Python's objects a million annotations
    would take gigabytes. A validation file may lack the list of annotations, as those of COCO's
    test images do: it is empty then.

    Args:
        paths: the annotations and the folder of images.
        strict: end with the first fault; else note each in `faults` and leave its entry out.

    Attributes:
        images: those that can be used, in the file's order. categories: id to name, by id.
        faults: (path of an image, or of the annotations; what is wrong), in the file's order.

    Raises:
        UserError: no such file, no JSON with COCO's lists, or `strict` and a fault.
    """

    def __init__(self, paths: CocoPaths, strict: bool = True):
        self.paths, self.strict = paths, strict
        self.faults: list[tuple[str, str]] = []
        lists = _read_lists(paths)
        self._objects = [] if lists.annotations is msgspec.UNSET else lists.annotations
        self._by_id: dict[int, Image] = {}
        self.images = list(self._check_images(lists.images))
        categories = dict(self._check_categories(lists.categories))
        self.categories = {key: categories[key] for key in sorted(categories)}

    def objects(self) -> Iterator[tuple[Annotation, Image]]:
        """Yields each object of a known image, and the image.

        Its `iscrowd` becomes 0 or 1, and its `id`, where it has none, its position in the list.
        """
        for number, raw in enumerate(self._objects):
            entry = self._typed("annotations", number, raw, Annotation)
            if entry is None:
                continue
            if entry.id is msgspec.UNSET:
                entry.id = f"[{number}]"
            name = f"annotation {shown(entry.id)}"
            image = self._by_id.get(entry.image_id)
            if image is None:
                self._fault(f"{name}: unknown image_id {entry.image_id}", "mend or remove it")
                continue
            if entry.category_id not in self.categories:
                unknown = f"{name}: unknown category_id {entry.category_id}"
                self._fault(unknown, "mend or remove it", image)
            crowd = _crowd(entry.iscrowd)
            if crowd is None:
                odd = f"{name}: iscrowd {shown(repr(entry.iscrowd))}, not 0 or 1"
                self._fault(odd, "write 0 for an object, 1 for a group of them", image)
            entry.iscrowd = crowd or 0
            yield entry, image

    def note(self, reason: str, image: Image | None = None) -> None:
        """Adds a fault of an image, or of the file itself."""
        file = self.paths.images / shown(image.file_name) if image else self.paths.annotations
        self.faults.append((str(file), reason))

    def _fault(self, reason: str, remedy: str, image: Image | None = None) -> None:
        if self.strict:
            where = f"{shown(image.file_name)}: " if image else ""
            raise UserError(f"{self.paths.annotations}: {where}{reason}; {remedy}")
        self.note(reason, image)

    def _typed(self, part: str, number: int, raw: Any, kind: type[Entry]) -> Entry | None:
        """Reads one entry; None where it is a fault."""
        try:
            if isinstance(raw, msgspec.Raw):
                return msgspec.json.decode(raw, type=kind)
            return msgspec.convert(raw, kind)
        except msgspec.DecodeError as error:
            what, _, where = str(error).partition(" - at `$")
            self._fault(f"{part}[{number}]{where.rstrip('`')}: {what}", "mend it")
            return None

    def _check_images(self, entries: Sequence[Any]) -> Iterator[Image]:
        names: dict[str, int] = {}
        if not entries:
            self._fault("the list 'images' is empty", "add images")
        for number, raw in enumerate(entries):
            image = self._typed("images", number, raw, Image)
            if image is None or not self._is_usable(image):
                continue
            other = self._by_id.setdefault(image.id, image)
            if other is not image:
                twice = f"id {image.id}, which {shown(other.file_name)} has, too"
                self._fault(twice, "give each image its own", image)
            if image.file_name in names and not self.strict:  # no fault of a run
                first = names[image.file_name]
                self.note(f"images {first} and {image.id} are of one file", image)
            names[image.file_name] = image.id
            yield image

    def _is_usable(self, image: Image) -> bool:
        """Returns whether an image has a size that can be read, and lies in its folder."""
        if image.height * image.width > MOST_PIXELS:
            self._fault(
                f"height and width say more than {MOST_PIXELS:,} pixels, which is more than can be "
                "read",
                "give those of the image file",
                image,
            )
            return False
        name = image.file_name
        if not self.paths.anywhere and (name.startswith("/") or ".." in name.split("/")):
            self._fault(
                "a file_name must lie in the folder of images, without '..' and without a '/' at "
                "its start",
                "write it so, or give --images-anywhere",
                image,
            )
            return False
        return True

    def _check_categories(self, entries: Sequence[Any]) -> Iterator[tuple[int, str]]:
        names: dict[int, str] = {}
        if not entries:
            self._fault("the list 'categories' is empty", "add categories")
        for number, raw in enumerate(entries):
            category = self._typed("categories", number, raw, Category)
            if category is None:
                continue
            key, name = category.id, str(category.name)
            if key in names:
                both = f"{shown(names[key])} and {shown(name)}"
                self._fault(f"categories {both} have the id {key}", "give each its own")
            elif name in names.values():
                self._fault(
                    f"two categories are named {shown(name)}",
                    "rename one, as classes are told apart by their names",
                )
            names[key] = name
            yield key, name


def _read_lists(paths: CocoPaths) -> Lists[Any]:
    path = paths.annotations
    try:
        lists = _parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name another with --{paths.part}-annotations"
        ) from None
    except RecursionError:
        raise UserError(
            f"{path}: cannot be read as JSON (lists in lists, too deep); write it again"
        ) from None
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: no COCO annotations: {error}; lists of images, categories and annotations "
            "are needed"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); write it again") from None
    if lists.annotations is msgspec.UNSET and paths.part != "val":
        raise UserError(f"{path}: no COCO annotations: the list 'annotations' is missing; add it")
    return lists


def _parse(text: bytes) -> Lists[Any]:
    try:
        return msgspec.json.decode(text, type=Lists[msgspec.Raw])
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # Python's own reads what is no JSON and yet written: NaN, half of a surrogate pair, a BOM
        return msgspec.convert(json.loads(text), Lists[Any])


def _crowd(value: Any) -> int | None:
    """Returns whether an object is a group of objects, as 0 or 1; None where that is not said."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        value = value.strip().lower()
    return CROWDS.get(value) if value is None or isinstance(value, (*NUMBERS, str)) else None


def shown(name: object) -> str:
    """Returns a name from a stranger's file, fit for a line of a message."""
    text = printable(str(name).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def box_fault(box: Any) -> str | None:
    """Returns why a value from JSON is not COCO's [x, y, w, h], or None if it is."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in NUMBERS for v in box):
        return NOT_FOUR
    return None if all(map(is_finite, box)) else "box is not finite"


def clip_box(box: Any, height: int, width: int) -> tuple[float, float, float, float] | str:
    """Returns COCO's [x, y, w, h] as x1, y1, x2, y2 inside the image, or why it is no box."""
    reason = box_fault(box)
    if reason:
        return reason
    x, y, w, h = box
    x1, x2 = max(x, 0), min(x + w, width)
    y1, y2 = max(y, 0), min(y + h, height)
    if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        return FRACTIONS if all(0 <= value <= 1 for value in box) else SMALL
    return x1, y1, x2, y2


class ObjectNotes:
    """Counts the objects that are of no use, by reason, and the boxes that reach out of images.

    State: for each reason a number and the first image (its index and name); of the boxes that can
    be used how many there are and how many reach out by a pixel or more.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, tuple[int, str]] = {}
        self.boxes = self.cut = 0

    def drop(self, reason: str, index: int, image: Image) -> None:
        """Counts an object of the image at `index` that is of no use."""
        self._counts[reason] += 1
        if reason not in self._first or index < self._first[reason][0]:
            self._first[reason] = index, image.file_name

    def use(self, box: Sequence[float], image: Image) -> None:
        """Counts a box [x, y, w, h] that can be used."""
        x, y, w, h = box
        self.boxes += 1
        self.cut += min(x, y, image.width - x - w, image.height - y - h) <= -1

    def counts(self) -> list[tuple[int, str, str]]:
        """Returns (objects, reason, first image) for each reason, by the order of those images."""
        by_image = sorted(self._first, key=lambda reason: self._first[reason][0])
        return [(self._counts[r], r, shown(self._first[r][1])) for r in by_image]

    def dropped_lines(self) -> list[str]:
        """Returns a line for each reason why objects are left out of training."""
        return [f"  dropped {n:,} objects: {r} (first in {name})" for n, r, name in self.counts()]

    def cut_line(self, end: str = "") -> str | None:
        """Returns a line where many boxes reach out of their images, as x1, y1, x2, y2 do."""
        if not self.cut or self.cut < MANY_CUT * self.boxes:
            return None
        return (
            f"{self.cut:,} of {self.boxes:,} boxes reach out of their images{end}: bbox must be "
            "x, y, width, height, not x1, y1, x2, y2"
        )

    def refusal(self, annotations: Path) -> UserError:
        """Returns the error of a run that has no object to train on."""
        counts = self.counts()
        if not counts:
            return UserError(
                f"{annotations}: no object to train on: the list 'annotations' is empty; add "
                "objects, or name another file with --train-annotations"
            )
        reasons = ", ".join(f"{n:,} {reason}" for n, reason, _ in counts)
        _, most, _ = max(counts, key=lambda count: count[0])
        remedy = REMEDIES.get(most, IN_PIXELS)
        return UserError(f"{annotations}: no object to train on: {reasons}; {remedy}")


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
        name = f"annotation {shown(entry.id)}"
        box = clip_box(entry.bbox, image.height, image.width)
        if isinstance(box, str):
            file.note(f"{name}: {box}", image)
        else:
            notes.use(entry.bbox, image)
        if entry.segmentation is not None:
            around = None if isinstance(box, str) else box
            fault = coco_masks.mask_fault(entry.segmentation, image.height, image.width, around)
            if fault:
                file.note(f"{name}: {fault}", image)
    if line := notes.cut_line():
        file.note(line)
    return {image.file_name: (image.height, image.width) for image in file.images}, file.faults

"""Finds a COCO split's images and annotations on disk, and checks that the ids agree."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.system.errors import UserError
from utils.system.text import printable

FIELDS = {  # list of a COCO file -> what each of its entries must have
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox"),
}
CROWD = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}  # True == 1 == 1.0
MOST_PIXELS = 2**31 - 1  # COCO's mask routines count pixels in 32 bits
NUMBERS = (int, float)  # as JSON gives them; by type() no bool is one
LARGEST = sys.float_info.max
NOT_FOUR = "box is not four numbers"
LONGEST_SHOWN = 120  # characters of a name in a message


@dataclass(frozen=True)
class Place:
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
) -> Place:
    """Returns where the split `part` ("train" or "val") of the data folder `root` is.

    Args:
        images: another name for `{part}2017`, in `root` or absolute.
        annotations: another name for `annotations/instances_{part}2017.json`.
        anywhere: as in `Place`.

    Raises:
        UserError: one of them does not exist.
    """
    root = Path(root)
    place = Place(
        part,
        root / (images or f"{part}2017"),
        root / (annotations or f"annotations/instances_{part}2017.json"),
        anywhere,
    )
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that holds {part}2017/")
    if not place.images.is_dir():
        raise UserError(f"{place.images}: no such folder; name another with --{part}-images")
    if not place.annotations.is_file():
        raise UserError(
            f"{place.annotations}: no such file; name another with --{part}-annotations"
        )
    return place


def read_json(place: Place) -> dict[str, Any]:
    """Reads a split's annotation file; checks its three lists, their ids and the classes' names.

    `iscrowd` of every object becomes 0 or 1. A validation file may lack the list of annotations,
    as those of COCO's test images do: it is empty then.

    Raises:
        UserError: no such file, no JSON, a list or field missing or of another kind, an id or a
            class name twice.
    """
    path = place.annotations
    content = parse_json(place)
    if place.part == "val":
        content.setdefault("annotations", [])
    for part, keys in FIELDS.items():
        if not isinstance(content.get(part), list):
            raise UserError(f"{path}: no COCO annotations: the list {part!r} is missing")
        for number, entry in enumerate(content[part]):
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking:
                where = f"{part}[{number}]{_of_image(entry, part, content['images'])}"
                raise UserError(f"{path}: {where} has no {lacking[0]!r}: add it")
    for number, image in enumerate(content["images"]):
        check_image(place, number, image)
    for part, named in (("images", "file_name"), ("categories", "name")):
        if not content[part]:
            raise UserError(f"{path}: the list {part!r} is empty")
        _check_ids(path, part, content[part], named)
    _check_names(path, content["categories"])
    for number, entry in enumerate(content["annotations"]):
        entry["iscrowd"] = crowd(path, number, entry)
    return content


def parse_json(place: Place) -> dict[str, Any]:
    path = place.annotations
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name another with --{place.part}-annotations"
        ) from None
    except RecursionError:
        raise UserError(
            f"{path}: cannot be read as JSON (lists in lists, too deep); write it again"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no COCO annotations: an object with images is wanted")
    return content


def check_image(place: Place, number: int, image: dict[str, Any]) -> None:
    """Refuses a size that no image has, and a name that leads out of the folder of images."""
    path, name = place.annotations, image["file_name"]
    if not isinstance(name, str):
        raise UserError(f"{path}: images[{number}], id {image['id']!r}: file_name is no text")
    sides = image["height"], image["width"]
    if not all(is_id(side) and side > 0 for side in sides):
        raise UserError(f"{path}: {shown(name)}: height and width must be whole numbers of pixels")
    if sides[0] * sides[1] > MOST_PIXELS:
        raise UserError(
            f"{path}: {shown(name)}: height and width say more than {MOST_PIXELS:,} pixels, which "
            "is more than can be read; give those of the image file"
        )
    if not place.anywhere and (name.startswith("/") or ".." in name.split("/")):
        raise UserError(
            f"{path}: {shown(name)}: a file_name must lie in the folder of images, without '..' "
            "and without a '/' at its start; write it so, or give --images-anywhere"
        )


def _check_ids(path: Path, part: str, entries: list[dict[str, Any]], named: str) -> None:
    seen: dict[int, Any] = {}
    for entry in entries:
        number, name = entry["id"], entry[named]
        if not is_id(number):
            raise UserError(f"{path}: {part}: {shown(name)} has the id {number!r}, no whole number")
        if number in seen:
            raise UserError(
                f"{path}: {part} have the id {number} twice, {shown(seen[number])} and "
                f"{shown(name)}: give each its own"
            )
        seen[number] = name


def _check_names(path: Path, categories: list[dict[str, Any]]) -> None:
    id_of: dict[str, int] = {}
    for category in categories:
        name = str(category["name"])
        if name in id_of:
            raise UserError(
                f"{path}: categories {id_of[name]} and {category['id']} are both named "
                f"{shown(name)!r}: rename one, as classes are told apart by their names"
            )
        id_of[name] = category["id"]


def crowd(path: Path, number: int, entry: dict[str, Any]) -> int:
    """Whether an object is a group of objects, as 0 or 1."""
    value = entry.get("iscrowd")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        value = value.strip().lower()
    if (value is None or isinstance(value, (int, float, str))) and value in CROWD:
        return CROWD[value]
    raise UserError(
        f"{path}: annotation {entry.get('id', f'[{number}]')!r} has iscrowd "
        f"{shown(repr(entry['iscrowd']))}: write 0 for an object, 1 for a group of them"
    )


def shown(name: object) -> str:
    """Returns a name from a stranger's file, fit for a line of a message."""
    text = printable(str(name).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def _of_image(entry: Any, part: str, images: list[dict[str, Any]]) -> str:
    """Returns " of image FILE" where the file says which, else an empty string."""
    if not isinstance(entry, dict) or part == "categories":
        return ""
    if part == "images":
        names = [entry["file_name"]] if "file_name" in entry else []
    else:
        names = [image["file_name"] for image in images if image["id"] == entry.get("image_id")]
    return f" of image {shown(names[0])}" if names else ""


def check_references(path: Path, content: dict[str, Any]) -> None:
    """Checks that every annotation's image and category are in the lists.

    Raises:
        UserError: one leads nowhere. It is not dropped: a file with such ids is of another data
            set, or cut.
    """
    images = {image["id"]: image["file_name"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for number, entry in enumerate(content["annotations"]):
        name = entry.get("id", f"[{number}]")
        if not is_id(entry["image_id"]) or entry["image_id"] not in images:
            raise UserError(
                f"{path}: annotation {name} is of image_id {entry['image_id']!r}, which is not "
                "among the images; mend or remove it"
            )
        if not is_id(entry["category_id"]) or entry["category_id"] not in categories:
            raise UserError(
                f"{path}: annotation {name} of image {shown(images[entry['image_id']])} has "
                f"category_id {entry['category_id']!r}, which is not among the categories; mend or "
                "remove it"
            )


def is_finite(value: Any) -> bool:
    """Returns whether a JSON value is a number that a float can hold: not text, NaN or infinite."""
    # A comparison takes integers of any size, which float() does not.
    return type(value) in NUMBERS and -LARGEST <= value <= LARGEST


def box_fault(box: Any) -> str | None:
    """Returns why a value from JSON is not COCO's [x, y, w, h], or None if it is."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        return NOT_FOUR
    return None if all(map(is_finite, box)) else "box is not finite"


def _is_number(value: Any) -> bool:
    return type(value) in NUMBERS


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""COCO's files on disk: where a split's images and annotations are, and whether the ids hold."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.system.errors import UserError


@dataclass(frozen=True)
class Place:
    """A split's folder of images and its annotation file."""

    part: str  # "train" or "val", as in the flags
    images: Path
    annotations: Path


def locate(
    root: str | Path, part: str, images: str | None = None, annotations: str | None = None
) -> Place:
    """Where the split `part` ("train" or "val") of the data folder `root` is.

    Args:
        images: another name for `{part}2017`, in `root` or absolute.
        annotations: another name for `annotations/instances_{part}2017.json`.

    Raises:
        UserError: one of them does not exist.
    """
    root = Path(root)
    place = Place(
        part,
        root / (images or f"{part}2017"),
        root / (annotations or f"annotations/instances_{part}2017.json"),
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
    """A split's annotation file with its three lists, their ids and the classes' names checked.

    Raises:
        UserError: no such file, no JSON, a list or field missing, an id or a class name twice.
    """
    path = place.annotations
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name another with --{place.part}-annotations"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no COCO annotations: an object with images is wanted")
    needs = {
        "images": ("id", "file_name", "height", "width"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id", "bbox"),
    }
    for part, keys in needs.items():
        if not isinstance(content.get(part), list):
            raise UserError(f"{path}: no COCO annotations: the list {part!r} is missing")
        for number, entry in enumerate(content[part]):
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking:
                where = f"{part}[{number}]{_of_image(entry, part, content['images'])}"
                raise UserError(f"{path}: {where} has no {lacking[0]!r}: add it")
    for number, image in enumerate(content["images"]):
        if not isinstance(image["file_name"], str):
            raise UserError(f"{path}: images[{number}], id {image['id']!r}: file_name is no text")
        if not all(_is_id(image[side]) and image[side] > 0 for side in ("height", "width")):
            raise UserError(
                f"{path}: {image['file_name']}: height and width must be whole numbers of pixels"
            )
    for part, named in (("images", "file_name"), ("categories", "name")):
        if not content[part]:
            raise UserError(f"{path}: the list {part!r} is empty")
        seen: dict[int, Any] = {}
        for entry in content[part]:
            number, name = entry["id"], entry[named]
            if not _is_id(number):
                raise UserError(f"{path}: {part}: {name} has the id {number!r}, no whole number")
            if number in seen:
                raise UserError(
                    f"{path}: {part} have the id {number} twice, {seen[number]} and {name}: give "
                    "each its own"
                )
            seen[number] = name
    id_of: dict[str, int] = {}
    for category in content["categories"]:
        name = str(category["name"])
        if name in id_of:
            raise UserError(
                f"{path}: categories {id_of[name]} and {category['id']} are both named {name!r}: "
                "rename one, as classes are told apart by their names"
            )
        id_of[name] = category["id"]
    return content


def _of_image(entry: Any, part: str, images: list[dict[str, Any]]) -> str:
    """ " of image FILE", where the file lets know which."""
    if not isinstance(entry, dict) or part == "categories":
        return ""
    if part == "images":
        names = [entry["file_name"]] if "file_name" in entry else []
    else:
        names = [image["file_name"] for image in images if image["id"] == entry.get("image_id")]
    return f" of image {names[0]}" if names else ""


def check_references(path: Path, content: dict[str, Any]) -> None:
    """Holds every annotation's image and category against the lists.

    Raises:
        UserError: one leads nowhere. It is not dropped: a file with such ids is of another data
            set, or cut.
    """
    images = {image["id"]: image["file_name"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for number, entry in enumerate(content["annotations"]):
        name = entry.get("id", f"[{number}]")
        if not _is_id(entry["image_id"]) or entry["image_id"] not in images:
            raise UserError(
                f"{path}: annotation {name} is of image_id {entry['image_id']!r}, which is not "
                "among the images; mend or remove it"
            )
        if not _is_id(entry["category_id"]) or entry["category_id"] not in categories:
            raise UserError(
                f"{path}: annotation {name} of image {images[entry['image_id']]} has category_id "
                f"{entry['category_id']!r}, which is not among the categories; mend or remove it"
            )


def is_finite(value: Any) -> bool:
    """Whether a value from JSON is a number that a float can hold: not text, NaN or infinite."""
    largest = sys.float_info.max  # a comparison takes integers of any size, which float() does not
    return _is_number(value) and -largest <= value <= largest


def box_fault(box: Any) -> str | None:
    """Why a value from JSON is not COCO's [x, y, w, h], or None if it is."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        return "box is not four numbers"
    return None if all(map(is_finite, box)) else "box is not finite"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

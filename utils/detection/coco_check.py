"""Every fault of a COCO file's lists, one by one: what tools.check_images tells of annotations.

Training ends at the first fault that it meets; whoever mends a file wants to see them all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.detection.coco_files import (
    FIELDS,
    Place,
    box_fault,
    check_image,
    crowd,
    is_id,
    parse_json,
    shown,
)
from utils.detection.coco_objects import clip_box, mask_fault
from utils.system.errors import UserError

Faults = list[tuple[str, str]]  # of a file, and what is wrong with it


class AnnotationCheck:
    """A COCO file looked through from its first entry to its last.

    Args:
        place: the annotations and the folder of images.

    Attributes:
        sizes: file name of an image → height and width, where its entry can be used.
        faults: (path of an image, or of the annotations; what is wrong), in the file's order.

    Raises:
        UserError: the file is no JSON with COCO's three lists.
    """

    def __init__(self, place: Place):
        self.place = place
        self.sizes: dict[str, tuple[int, int]] = {}
        self.faults: Faults = []
        self._images: dict[int, Mapping[str, Any]] = {}
        content = parse_json(place)
        for part in FIELDS:
            if not isinstance(content.get(part, [] if place.part == "val" else None), list):
                raise UserError(
                    f"{place.annotations}: no COCO annotations: the list {part!r} is missing"
                )
        self._check_images(content["images"])
        categories = self._check_categories(content["categories"])
        for number, entry in enumerate(content.get("annotations", [])):
            self._check_object(number, entry, categories)

    def _add(self, reason: str, name: object = None) -> None:
        """Notes a fault of the image `name`, or of the file itself."""
        place = self.place
        file = place.annotations if name is None else place.images / shown(name)
        self.faults.append((str(file), reason))

    def _lacks(self, part: str, number: int, entry: Any) -> bool:
        """Notes an entry that is no mapping or lacks a field."""
        lacking = [key for key in FIELDS[part] if not isinstance(entry, dict) or key not in entry]
        if lacking:
            self._add(f"{part}[{number}] has no {lacking[0]!r}")
        return bool(lacking)

    def _check_images(self, entries: list[Any]) -> None:
        names: dict[str, int] = {}
        for number, entry in enumerate(entries):
            if self._lacks("images", number, entry):
                continue
            name, key = entry["file_name"], entry["id"]
            try:
                check_image(self.place, number, entry)
            except UserError as error:
                self._add(str(error).removeprefix(f"{self.place.annotations}: "))
                continue
            self.sizes[name] = entry["height"], entry["width"]
            if not is_id(key):
                self._add(f"id {shown(repr(key))}, no whole number", name)
            elif key in self._images:
                self._add(f"id {key}, which {shown(self._images[key]['file_name'])} has, too", name)
            else:
                self._images[key] = entry
            if name in names:
                self._add(f"images {shown(names[name])} and {shown(key)} are of one file", name)
            names[name] = key

    def _check_categories(self, entries: list[Any]) -> set[int]:
        known: dict[int, str] = {}
        for number, entry in enumerate(entries):
            if self._lacks("categories", number, entry):
                continue
            name, key = str(entry["name"]), entry["id"]
            if not is_id(key):
                self._add(f"category {shown(name)} has the id {shown(repr(key))}, no whole number")
                continue
            if key in known:
                self._add(f"categories {shown(known[key])} and {shown(name)} have the id {key}")
            elif name in known.values():
                self._add(f"two categories are named {shown(name)}")
            known[key] = name
        return set(known)

    def _check_object(self, number: int, entry: Any, categories: set[int]) -> None:
        if self._lacks("annotations", number, entry):
            return
        name, key = shown(entry.get("id", f"[{number}]")), entry["image_id"]
        image = self._images.get(key) if is_id(key) else None
        if image is None:
            self._add(f"annotation {name} has the unknown image_id {shown(repr(key))}")
            return
        for reason in object_faults(self.place.annotations, number, entry, image, categories):
            self._add(f"annotation {name}: {reason}", image["file_name"])


def object_faults(
    path: Path,
    number: int,
    entry: Mapping[str, Any],
    image: Mapping[str, Any],
    categories: set[int],
) -> list[str]:
    """Returns all that is wrong with an object of a known image.

    Args:
        path: of the annotations.
        number: place of the object in the list.
        categories: ids of the categories.
    """
    faults = []
    if not is_id(entry["category_id"]) or entry["category_id"] not in categories:
        faults.append(f"unknown category_id {shown(repr(entry['category_id']))}")
    try:
        crowd(path, number, entry)
    except UserError:
        faults.append(f"iscrowd {shown(repr(entry['iscrowd']))}, not 0 or 1")
    if reason := box_fault(entry["bbox"]):
        faults.append(reason)
    else:
        box = clip_box(entry["bbox"], image["height"], image["width"])
        faults += [box] if isinstance(box, str) else []
    mask = entry.get("segmentation")
    if mask is not None and (reason := mask_fault(mask, image)):
        faults.append(reason)
    return faults

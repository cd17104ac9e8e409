"""Prepares the objects that detections are compared with, with ids and areas filled in."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from utils.detection import coco_masks
from utils.detection.coco_files import (
    Place,
    box_fault,
    check_references,
    is_finite,
    read_json,
    shown,
)

MOST_JUDGED = 100  # detections of an image, in COCO's figures
KINDS = {"bbox": "box", "segm": "mask"}  # COCO's words, and the columns'


class JudgedObjects:
    """Holds the objects of a COCO file that detections are compared with.

    Boxes are judged on every object with a finite box. An object without a usable mask is ignored
    where masks are judged: its box is a crowd's, in which detections are neither right nor wrong.

    Images, classes and objects are numbered from 1 here, as COCO's code reads ids into floats,
    which tell no two integers above 2^53 from one another.

    Args:
        place: its annotations.
        masks: whether masks are judged, too.
        classes: names that are reported besides the file's own; their AP is -1.

    Attributes:
        kinds: what is judged: "bbox", and "segm" with masks.
        image_numbers, class_numbers: the file's id → number, by id.
        names: of the classes. other_names: those of `classes` that the file lacks.
        annotations: of each kind, with all that the evaluation reads.

    Raises:
        UserError: the file is no COCO file, see `read_json` and `check_references`.
    """

    def __init__(self, place: Place, masks: bool, classes: Sequence[str] = ()):
        content = read_json(place)
        check_references(place.annotations, content)
        images = {image["id"]: image for image in content["images"]}
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.image_numbers = {key: number for number, key in enumerate(sorted(images), 1)}
        self.class_numbers = {entry["id"]: number for number, entry in enumerate(categories, 1)}
        self.sizes = [(images[key]["height"], images[key]["width"]) for key in self.image_numbers]
        self.names = [str(category["name"]) for category in categories]
        self.other_names = [name for name in classes if name not in self.names]
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        self.annotations: dict[str, list[dict]] = {kind: [] for kind in self.kinds}
        self.without_box = self.without_mask = 0
        for entry in content["annotations"]:
            self._add(entry, images[entry["image_id"]])

    def _add(self, entry: dict, image: dict) -> None:
        """Adds an object to the kinds in which it can be judged."""
        size = image["height"], image["width"]
        box = None if box_fault(entry["bbox"]) else [float(value) for value in entry["bbox"]]
        segm = "segm" in self.kinds
        mask = coco_masks.to_rle(entry.get("segmentation"), *size) if segm else None
        self.without_box += box is None
        self.without_mask += segm and mask is None
        area = entry.get("area")
        if not is_finite(area) or area < 0:  # missing, or as good as missing
            area = coco_masks.area(mask) if mask else box[2] * box[3] if box else 0
        judged = {
            "image_id": self.image_numbers[entry["image_id"]],
            "category_id": self.class_numbers[entry["category_id"]],
            "iscrowd": entry["iscrowd"],
            "area": float(area),
        }
        if box:
            self._append("bbox", {**judged, "bbox": box})
        if mask:
            self._append("segm", {**judged, "segmentation": mask})
        elif segm and box and (mask := coco_masks.of_box(box, *size)):
            self._append("segm", {**judged, "segmentation": mask, "iscrowd": 1})

    def _append(self, kind: str, annotation: dict) -> None:
        """Adds an annotation with an id of its own: COCO's may repeat, or be 0, which means "no
        match".
        """
        annotations = self.annotations[kind]
        annotations.append({**annotation, "id": len(annotations) + 1})

    @property
    def lines(self) -> list[str]:
        """Returns lines on what is not judged."""
        lines = []
        if self.without_box:
            lines.append(
                f"  not evaluated: {self.without_box:,} objects without a finite box of four "
                "numbers"
            )
        if self.without_mask:
            lines.append(
                f"  ignored for masks: {self.without_mask:,} objects without a usable mask"
            )
        for kind in self.kinds:
            if all(annotation["iscrowd"] for annotation in self.annotations[kind]):
                lines.append(f"  ! no object has a {KINDS[kind]}: {KINDS[kind]} AP will be -")
        if self.other_names:
            lines.append(
                f"  ! {len(self.other_names):,} classes of the network are not among the "
                f"categories, such as {shown(self.other_names[0])}: their detections are left out"
            )
        return lines

    def report(self, name: str) -> list[str]:
        """Returns lines that say what is judged and what is not."""
        objects = [a for a in self.annotations["bbox"] if not a["iscrowd"]]
        empty = len(self.image_numbers) - len({a["image_id"] for a in objects})
        note = f", {empty:,} of them without objects" if empty else ""
        head = (
            f"{name}: {len(self.image_numbers):,} images{note}, {len(objects):,} objects of "
            f"{len(self.names)} classes"
        )
        many = sum(n > MOST_JUDGED for n in Counter(a["image_id"] for a in objects).values())
        if not many:
            return [head, *self.lines]
        return [
            head,
            f"  ! {many:,} images have more than {MOST_JUDGED} objects: COCO counts the "
            f"{MOST_JUDGED} surest detections of an image, so AP cannot reach 100",
            *self.lines,
        ]

    def dataset(self, annotations: Sequence[dict]) -> dict[str, Any]:
        """Returns a COCO file's content with copies of these annotations, as COCO's code changes
        them.
        """
        images = [
            {"id": number, "height": height, "width": width}
            for number, (height, width) in enumerate(self.sizes, 1)
        ]
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names, 1)]
        copies = [dict(annotation) for annotation in annotations]
        return {"info": {}, "images": images, "categories": categories, "annotations": copies}

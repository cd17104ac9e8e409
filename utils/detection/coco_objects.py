"""Collects the objects of a COCO file as arrays, and why some are left out of training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.detection import coco_masks
from utils.detection.coco_files import NOT_FOUR, box_fault, shown
from utils.system.errors import UserError

MIN_SIDE = 1.0  # pixels that a box must have on each side after clipping
MANY_CUT = 0.1  # share of boxes that reach out of their images from which on it is said
CROWD = "a crowd under one box"
SMALL = f"box under {MIN_SIDE:g} pixel, or outside the image"
FRACTIONS = "box under 1 pixel, with all its numbers from 0 to 1"
NO_POLYGON = "mask is no polygon"
NO_RUNS = "mask is no run-length code of the image's size"
NO_PIXEL = "mask without a pixel"
IN_PIXELS = "write bbox as x, y, width, height in pixels"
NEEDS_MASKS = "add polygons, or train faster_rcnn or retinanet, which need boxes alone"
REMEDIES = {  # reason -> what to do where no object is left
    CROWD: "write iscrowd 0 for single objects",
    NOT_FOUR: IN_PIXELS,
    FRACTIONS: IN_PIXELS,
    NO_POLYGON: NEEDS_MASKS,
    NO_RUNS: NEEDS_MASKS,
    NO_PIXEL: NEEDS_MASKS,
}


@dataclass
class Dropped:
    """Counts the objects that were left out, by reason, with the first image of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, image: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, image)

    def lines(self) -> list[str]:
        return [
            f"  dropped {n:,} objects: {reason} (first in {shown(self.first[reason])})"
            for reason, n in self.counts.items()
        ]

    def refusal(self, annotations: Path) -> UserError:
        """Returns the error of a run that has no object to train on."""
        if not self.counts:
            return UserError(
                f"{annotations}: no object to train on: the list 'annotations' is empty; add "
                "objects, or name another file with --train-annotations"
            )
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.items())
        most = max(self.counts, key=self.counts.__getitem__)
        remedy = REMEDIES.get(most, IN_PIXELS)
        return UserError(f"{annotations}: no object to train on: {reasons}; {remedy}")


class TextArray:
    """Holds strings in two numpy arrays."""

    def __init__(self, texts: Sequence[bytes]):
        self.ends = np.cumsum([0, *map(len, texts)])
        self.data = np.frombuffer(b"".join(texts), dtype=np.uint8)

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.ends[index] : self.ends[index + 1]].tobytes()

    def select(self, indices: Sequence[int]) -> "TextArray":
        return TextArray([self[i] for i in indices])


@dataclass(frozen=True)
class Objects:
    """Holds the objects of all images, one image after the other.

    Attributes:
        starts: (N + 1,); objects starts[i] to starts[i + 1] are image i's.
        boxes: (M, 4) float32 x1, y1, x2, y2 inside the image.
        labels: (M,) int64 class indices.
        masks: for each object its segmentation as JSON; None where masks were not asked for.
        dropped: those left out.
        cut: how many boxes reach out of their images by a pixel or more.
    """

    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: TextArray | None
    dropped: Dropped
    cut: int

    def lines(self) -> list[str]:
        """Returns lines on what was left out, and a warning where many boxes had to be cut."""
        lines = self.dropped.lines()
        if self.cut and self.cut >= MANY_CUT * len(self.boxes):
            lines.append(
                f"  ! {self.cut:,} of {len(self.boxes):,} boxes reach out of their images and are "
                "cut: bbox must be x, y, width, height, not x1, y1, x2, y2"
            )
        return lines


def collect_objects(
    content: Mapping[str, Any], index_of: Mapping[int, int], masks: bool, drop_crowds: bool
) -> Objects:
    """Gathers the objects that a detector can be trained on.

    Args:
        content: of a COCO file, checked by `read_json` and `check_references`.
        index_of: category id → class index.
        masks: keep segmentations, and drop objects that have none.
        drop_crowds: leave out groups marked iscrowd.
    """
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        by_image[entry["image_id"]].append(entry)
    dropped, cut = Dropped(), 0
    boxes, labels, texts, starts = [], [], [], [0]
    for image in content["images"]:
        for entry in by_image[image["id"]]:
            box = clip_box(entry["bbox"], image["height"], image["width"])
            reason = box if isinstance(box, str) else None
            if drop_crowds and entry["iscrowd"]:
                reason = CROWD
            elif masks and reason is None:
                reason = mask_fault(entry.get("segmentation"), image)
            if reason is not None:
                dropped.note(reason, image["file_name"])
                continue
            boxes.append(box)
            labels.append(index_of[entry["category_id"]])
            cut += _reaches_out(entry["bbox"], image)
            if masks:
                texts.append(json.dumps(entry["segmentation"]).encode())
        starts.append(len(boxes))
    return Objects(
        np.array(starts),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        TextArray(texts) if masks else None,
        dropped,
        cut,
    )


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


def _reaches_out(box: Sequence[float], image: Mapping[str, Any]) -> bool:
    x, y, w, h = box
    return min(x, y, image["width"] - x - w, image["height"] - y - h) <= -1


def mask_fault(segmentation: Any, image: Mapping[str, Any]) -> str | None:
    """Returns why an object's segmentation is no mask with a pixel, or None if it is one."""
    height, width = image["height"], image["width"]
    segmentation = coco_masks.as_masks(segmentation)
    if isinstance(segmentation, dict):
        rle = coco_masks.to_rle(segmentation, height, width)
        if rle is None:
            return NO_RUNS
        return None if coco_masks.area(rle) else NO_PIXEL
    polygons = coco_masks.usable_polygons(segmentation, height, width)
    if not polygons:
        return NO_POLYGON
    return None if coco_masks.covers_a_pixel(polygons, height, width) else NO_PIXEL

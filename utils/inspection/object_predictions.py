"""Finds objects in a user's images one by one, and writes them as lines, pictures and COCO JSON."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data.decoding import BrokenImageError, read_image
from utils.detection import coco_masks
from utils.detection.coco_evaluation import MASK_THRESHOLD, to_results
from utils.detection.drawing import draw, enlarge
from utils.system.errors import UserError
from utils.system.fault_messages import is_out_of_memory
from utils.system.files import write_atomically
from utils.system.text import cell, printable

SMALLEST, LARGEST = 320, 1000  # pixels of a drawn picture's longer side


@dataclass(frozen=True)
class Found:
    """Holds the detections in one image, highest score first, or why there are none.

    Attributes:
        size: height and width of the image file.
        image: (3, H, W) uint8, smaller than the file where that is larger than the network's input.
        objects: boxes (n, 4) as x1, y1, x2, y2 in the pixels of `image`, scores (n,), labels (n,)
            as indices of class names, and with a mask network masks (n, 1, H, W) from 0 to 1.
    """

    file: str
    size: tuple[int, int] = (0, 0)
    image: Tensor | None = None
    objects: dict[str, Tensor] | None = None
    error: str | None = None


@torch.inference_mode()
def find_objects(
    detector: nn.Module, paths: Sequence[bytes], device: torch.device, first_label: int
) -> Iterator[Found]:
    """Runs the detector on one image after the other, as it is evaluated: unpadded.

    An image larger than the detector's input is first reduced to it: a hundred masks in the size of
    a 12-megapixel photograph would take 5 GB.

    Args:
        detector: a list of (3, H, W) in 0…1 → one dict of boxes, labels, scores (and masks) each.
        first_label: the label of the first class.
    """
    for path in paths:
        file = printable(path)
        try:
            image = read_image(path)
        except BrokenImageError as error:
            yield Found(file, error=error.reason)
            continue
        size = tuple(image.shape[1:])
        if max(size) > detector.transform.max_size:
            image = _resized(image, detector.transform.max_size / max(size))
        try:
            (objects,) = detector([image.to(device).float() / 255])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            yield Found(file, error="out of memory")
            continue
        objects = {name: value.cpu() for name, value in objects.items()}
        objects["labels"] = objects["labels"] - first_label
        if not all(objects[name].isfinite().all() for name in ("boxes", "scores")):
            yield Found(file, error="the network's output is not finite")
            continue
        yield Found(file, size, image, objects)


def sentence(found: Found, names: Sequence[str], least_score: float, width: int) -> str:
    """Returns one line: the path, and the objects with at least this score."""
    told = [
        f"{names[label]} {score:.2f}"
        for label, score in zip(
            found.objects["labels"].tolist(), found.objects["scores"].tolist(), strict=True
        )
        if score >= least_score
    ]
    return f"{found.file:<{width}}  {'   '.join(told) or '-'}"


def picture(found: Found, names: Sequence[str], least_score: float) -> Tensor:
    """Returns the image with its objects drawn on it, at a size at which captions can be read."""
    image, objects = found.image, found.objects
    longest = max(image.shape[1:])
    if longest > LARGEST:
        image, objects = _shrink(image, objects, LARGEST / longest)
    return draw(*enlarge(image, objects, max(1, SMALLEST // longest)), names, least_score)


def _shrink(
    image: Tensor, objects: dict[str, Tensor], scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    image = _resized(image, scale)
    objects = {**objects, "boxes": objects["boxes"] * scale}
    if "masks" in objects:
        objects["masks"] = F.interpolate(objects["masks"], image.shape[1:], mode="bilinear")
    return image, objects


def _resized(image: Tensor, scale: float) -> Tensor:
    size = [max(1, round(scale * side)) for side in image.shape[1:]]
    return F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)


class CocoDocument:
    """Collects images, detections and categories in one JSON document, as COCO annotates a data
    set.

    Every detection is an annotation with a `score`; its list is COCO's result format too.

    Args:
        names: of the classes; `category_ids` are theirs in the training data.
    """

    def __init__(self, names: Sequence[str], category_ids: Sequence[int]):
        self.names, self.category_ids = names, category_ids
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, found: Found) -> None:
        height, width = found.size
        image_id = len(self.images) + 1
        self.images.append(
            {"id": image_id, "file_name": found.file, "width": width, "height": height}
        )
        across, down = width / found.image.shape[2], height / found.image.shape[1]
        boxes = found.objects["boxes"] * torch.tensor([across, down, across, down])
        plain = {**found.objects, "boxes": boxes}
        masks = plain.pop("masks", None)
        for i, result in enumerate(to_results(plain, image_id, self.category_ids, first_label=0)):
            area = result["bbox"][2] * result["bbox"][3]
            if masks is not None:  # one by one, for they can be large
                mask = F.interpolate(masks[i : i + 1], found.size, mode="bilinear")[0]
                (result["segmentation"],) = coco_masks.encode((mask > MASK_THRESHOLD).numpy())
                area = coco_masks.area(result["segmentation"])
            extra = {"id": len(self.annotations) + 1, "area": area, "iscrowd": 0}
            self.annotations.append(result | extra)

    def json(self) -> str:
        categories = [
            {"id": i, "name": name} for i, name in zip(self.category_ids, self.names, strict=True)
        ]
        document = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        return json.dumps(document, ensure_ascii=False) + "\n"

    def csv(self) -> str:
        """Returns one line a detection: file, class, score, and the box's corners in pixels."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "class", "score", "x1", "y1", "x2", "y2"])
        name_of = dict(zip(self.category_ids, self.names, strict=True))
        for found in self.annotations:
            x, y, width, height = found["bbox"]
            corners = [f"{v:.2f}" for v in (x, y, x + width, y + height)]
            file = self.images[found["image_id"] - 1]["file_name"]
            writer.writerow(
                [cell(file), cell(name_of[found["category_id"]]), f"{found['score']:.6f}", *corners]
            )
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Writes detections.json and detections.csv to `folder`."""
        write_atomically(folder / "detections.json", self.json().encode())
        write_atomically(folder / "detections.csv", self.csv().encode())


def class_table(saved: dict, classes: int) -> tuple[list[str], list[int]]:
    """Returns names and category ids of a detector's checkpoint.

    Raises:
        UserError: it does not name each of its classes.
    """
    names = [printable(name) for name in saved.get("classes") or ()]
    ids = list(saved.get("category_ids") or range(1, len(names) + 1))
    if not len(names) == len(ids) == classes:
        raise UserError(
            f"the checkpoint names {len(names)} of its detector's {classes} classes; give one that "
            "detect_main.py wrote"
        )
    return names, ids

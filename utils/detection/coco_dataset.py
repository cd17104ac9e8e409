"""Reads a COCO split as training samples: the JSON checked once, images read one by one.

What cannot be trained on is dropped, counted and said; what is wrong (an id that leads nowhere, an
image of another size than stated) ends the run with one line that names the image if it is known.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.data.decoding import BrokenImageError, read_image
from utils.data.sampler import Key, mix_seed
from utils.detection import coco_masks
from utils.detection.coco_files import Place, check_references, read_json
from utils.detection.coco_images import refuse_missing
from utils.detection.coco_objects import TextArray, collect_objects
from utils.system.errors import UserError
from utils.system.text import printable

Target = dict[str, torch.Tensor]


@dataclass
class CocoSplit:
    """Holds images, classes and objects of one JSON, in arrays that loader processes share.

    Attributes:
        folder: of the images.
        image_ids, file_names, sizes: of each image; sizes are (N, 2) height and width.
        category_ids, classes: ids and names, by id; a class's index is its place here.
        starts: (N + 1,); objects starts[i] to starts[i + 1] are image i's.
        boxes: (M, 4) float32 x1, y1, x2, y2 inside the image.
        labels: (M,) int64 class indices.
        masks: for each object its segmentation as JSON; None where masks were not asked for. Text
            in one array, as 860,000 Python objects would be copied into every loader process.
        notes: lines that say what was left out, and what is odd.
    """

    folder: Path
    image_ids: list[int]  # of any size, which numpy's integers are not
    file_names: list[str]
    sizes: np.ndarray
    category_ids: list[int]
    classes: list[str]
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: TextArray | None
    notes: list[str]

    def __len__(self) -> int:
        return len(self.file_names)

    def report(self, name: str) -> list[str]:
        """Returns lines that say what is in the split and what was left out of it."""
        empty = int((np.diff(self.starts) == 0).sum())
        note = f", {empty:,} of them without objects" if empty else ""
        head = (
            f"{name}: {len(self):,} images{note}, {len(self.labels):,} objects of "
            f"{len(self.classes)} classes"
        )
        return [head, *self.notes]

    def select(self, keep: np.ndarray) -> "CocoSplit":
        """Returns the split with the images at the indices `keep` only."""
        spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in keep]
        objects = np.concatenate([np.empty(0, dtype=np.int64), *spans]).astype(np.int64)
        counts = np.diff(self.starts)[keep]
        return CocoSplit(
            self.folder,
            [self.image_ids[i] for i in keep],
            [self.file_names[i] for i in keep],
            self.sizes[keep],
            self.category_ids,
            self.classes,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            self.boxes[objects],
            self.labels[objects],
            None if self.masks is None else self.masks.select(objects),
            self.notes,
        )


def load_split(
    place: Place,
    masks: bool = False,
    drop_crowds: bool = True,
    drop_empty: bool = False,
) -> CocoSplit:
    """Reads and checks one split.

    Args:
        place: its images and annotations.
        masks: keep segmentations, and drop objects that have none.
        drop_crowds: leave out groups marked iscrowd, whose one box is around many objects.
        drop_empty: leave out images without objects; else they train as background.

    Raises:
        UserError: see `read_json` and `check_references`; an image file is missing; no object of
            the training part is left to train on.
    """
    content = read_json(place)
    check_references(place.annotations, content)
    images = content["images"]
    refuse_missing(place, [image["file_name"] for image in images])
    categories = sorted(content["categories"], key=lambda category: category["id"])
    index_of = {category["id"]: i for i, category in enumerate(categories)}
    objects = collect_objects(content, index_of, masks, drop_crowds)
    if place.part == "train" and len(objects.labels) == 0:
        raise objects.dropped.refusal(place.annotations)
    split = CocoSplit(
        place.images,
        [image["id"] for image in images],
        [image["file_name"] for image in images],
        np.array([(image["height"], image["width"]) for image in images]),
        [category["id"] for category in categories],
        [str(category["name"]) for category in categories],
        objects.starts,
        objects.boxes,
        objects.labels,
        objects.masks,
        objects.lines(),
    )
    return split.select(np.flatnonzero(np.diff(split.starts))) if drop_empty else split


class CocoDataset(Dataset):
    """Gives samples by (epoch, index): (uint8 (3, H, W), target, image id), or the fault.

    A target has boxes (n, 4) float32, labels (n,) int64 and, where the split has them, masks
    (n, H, W) uint8. An image without objects has n = 0.

    Args:
        split: what to read.
        first_label: the label of the split's first class.
        hflip: probability of a mirrored image, drawn from (seed, epoch, index) alone.
    """

    def __init__(self, split: CocoSplit, first_label: int, hflip: float = 0.0, seed: int = 0):
        self.split, self.first_label, self.hflip, self.seed = split, first_label, hflip, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(
        self, key: Key
    ) -> tuple[torch.Tensor, Target, int] | BrokenImageError | UserError:
        epoch, index = key
        path = self.split.folder / self.split.file_names[index]
        try:
            image = read_image(str(path))
        except (BrokenImageError, UserError) as error:
            return error
        height, width = self.split.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            return BrokenImageError(
                printable(str(path)),
                f"{image.shape[2]}x{image.shape[1]} pixels, "
                f"but {width}x{height} in the annotations",
            )
        target = self._target(index, height, width)
        if self.hflip and torch.rand((), generator=self._chance(epoch, index)) < self.hflip:
            image, target = image.flip(-1), mirror(target, width)
        return image, target, self.split.image_ids[index]

    def _chance(self, epoch: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix_seed(self.seed, epoch, index))

    def _target(self, index: int, height: int, width: int) -> Target:
        split = self.split
        span = slice(int(split.starts[index]), int(split.starts[index + 1]))
        target = {
            "boxes": torch.from_numpy(split.boxes[span].copy()),
            "labels": torch.from_numpy(split.labels[span] + self.first_label),
        }
        if split.masks is not None:
            masks = np.zeros((span.stop - span.start, height, width), dtype=np.uint8)
            for i, number in enumerate(range(span.start, span.stop)):
                rle = coco_masks.to_rle(json.loads(split.masks[number]), height, width)
                masks[i] = coco_masks.decode(rle)
            target["masks"] = torch.from_numpy(masks)
        return target


def mirror(target: Target, width: int) -> Target:
    """Returns the target of the mirrored image."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    flipped = {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], 1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(2)
    return flipped

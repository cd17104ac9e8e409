"""Reads a COCO split as training samples: objects as arrays, images one by one.

What cannot be trained on is dropped, counted and said; an image of another size than stated ends
the run with one line that names it.
"""

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.utils.data import Dataset

from utils.data import coco_masks
from utils.data.coco import CocoFile, CocoPaths, ObjectNotes, counts_line, shown, usable_box
from utils.data.decoding import BrokenImageError, read_image
from utils.data.sampler import Key, mix_seed
from utils.system.errors import UserError
from utils.system.text import printable

Target = dict[str, Any]


class TextArray:
    """Holds strings in two numpy arrays: a million Python objects are copied into every worker.

    Args:
        data: the strings, one after the other. ends: (N,) where each ends in `data`, in bytes.
    """

    def __init__(self, data: bytes | bytearray, ends: Sequence[int] | np.ndarray):
        self.data = np.frombuffer(data, dtype=np.uint8)
        self.ends = np.concatenate([[0], np.asarray(ends, dtype=np.int64)])

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.ends[index] : self.ends[index + 1]].tobytes()

    def select(self, indices: np.ndarray) -> "TextArray":
        """Returns the strings at `indices`."""
        data = bytearray()
        for index in indices:
            data += self.data[self.ends[index] : self.ends[index + 1]].data
        return TextArray(data, np.cumsum(np.diff(self.ends)[indices]))


@dataclass
class CocoSplit:
    """Holds images, classes and objects of one JSON, in arrays that loader processes share."""

    folder: Path  # of the images
    # image_ids, file_names, sizes: of each image; sizes are (N, 2) height and width
    image_ids: list[int]  # of any size, which numpy's integers are not
    file_names: list[str]
    sizes: np.ndarray
    # category_ids, classes: ids and names, by id; a class's index is its position here
    category_ids: list[int]
    classes: list[str]
    starts: np.ndarray  # (N + 1,); objects starts[i] to starts[i + 1] are image i's
    boxes: np.ndarray  # (M, 4) float32 x1, y1, x2, y2 inside the image
    labels: np.ndarray  # (M,) int64 class indices
    masks: TextArray | None  # for each object its segmentation as JSON; None without masks
    notes: list[str]  # lines that say what was left out, and what is odd

    def __len__(self) -> int:
        return len(self.file_names)

    def report(self, name: str) -> list[str]:
        """Returns lines that say what is in the split and what was left out of it."""
        empty = int((np.diff(self.starts) == 0).sum())
        head = counts_line(name, len(self), empty, len(self.labels), len(self.classes))
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
    paths: CocoPaths, masks: bool = False, drop_crowds: bool = True, drop_empty: bool = False
) -> CocoSplit:
    """Reads and checks one split.

    Args:
        masks: read segmentations, and drop objects that have none.
        drop_crowds: leave out groups marked iscrowd, whose one box is around many objects.
        drop_empty: leave out images without objects; else they train as background.

    Raises:
        UserError: see `CocoFile`; an image file is missing; no object of the training part is left
            to train on.
    """
    file = CocoFile(paths)
    listed = list(file.images.values())
    names = [image.file_name for image in listed]
    refuse_missing(paths, names)
    index_of = {key: index for index, key in enumerate(file.images)}
    label_of = {key: label for label, key in enumerate(file.categories)}
    notes = ObjectNotes()
    images, labels, boxes = array("q"), array("q"), array("f")
    texts, ends = bytearray(), array("q")
    for entry, image in file.objects():
        box = usable_box(entry, image, masks, not drop_crowds)
        if isinstance(box, str):
            notes.drop(box, image)
            continue
        notes.use(entry.bbox, image)
        images.append(index_of[image.id])
        labels.append(label_of[entry.category_id])
        boxes.extend(box)
        if masks:
            texts += msgspec.json.encode(entry.segmentation)
            ends.append(len(texts))
    if paths.part == "train" and not labels:
        raise notes.refusal(paths.annotations)
    of_image = np.array(images, dtype=np.int64)
    order = np.argsort(of_image, kind="stable")
    counts = np.bincount(of_image, minlength=len(names))
    split = CocoSplit(
        paths.images,
        list(file.images),
        names,
        np.array([(image.height, image.width) for image in listed]),
        list(file.categories),
        list(file.categories.values()),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.array(boxes, dtype=np.float32).reshape(-1, 4)[order],
        np.array(labels, dtype=np.int64)[order],
        TextArray(texts, ends).select(order) if masks else None,
        notes.lines("  dropped {}", " and are cut"),
    )
    return split.select(np.flatnonzero(counts)) if drop_empty else split


def refuse_missing(paths: CocoPaths, names: Sequence[str]) -> None:
    """Looks for each file name of a split in the folder of images.

    A link that leaves the folder may be a stranger's; the folder itself may be a link: that is the
    user's own arrangement.

    Raises:
        UserError: some are missing, or a link leads out of the folder; it names one.
    """
    missing = [name for name in names if not os.path.isfile(os.path.join(paths.images, name))]
    if missing:
        raise UserError(
            f"{paths.images}: {len(missing):,} of {len(names):,} images are missing, such as "
            f"{shown(missing[0])}; name the folder with --{paths.part}-images, or mend file_name "
            "(folder/name, below that folder)"
        )
    if paths.anywhere:
        return
    home = os.path.realpath(paths.images)
    folders = {os.path.dirname(name) for name in names}
    real = {folder: os.path.realpath(os.path.join(home, folder)) for folder in folders}
    for name in names:
        folder, file = os.path.split(name)
        target = os.path.join(real[folder], file)
        if os.path.islink(target):
            target = os.path.realpath(target)
        if not target.startswith(home + os.sep):
            raise UserError(
                f"{paths.images}: {shown(name)} is a link to {shown(target)}, outside of that "
                "folder; give --images-anywhere if it is yours"
            )


class CocoDataset(Dataset[Any]):
    """Gives samples by (epoch, index): (uint8 (3, H, W), target, image id), or the fault.

    A target has boxes (n, 4) float32, labels (n,) int64 and, where the split has them, masks
    (n, H, W) uint8; and min_size, where there are several. An image without objects has n = 0.

    Args:
        first_label: the label of the split's first class.
        hflip: probability of a mirrored image, drawn from (seed, epoch, index) alone.
        sizes: of the shorter side; of several one is drawn for each image, likewise.
    """

    def __init__(
        self,
        split: CocoSplit,
        first_label: int,
        hflip: float = 0.0,
        seed: int = 0,
        sizes: Sequence[int] = (),
    ):
        self.split, self.first_label, self.hflip, self.seed = split, first_label, hflip, seed
        self.sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(
        self, key: Key
    ) -> tuple[torch.Tensor, Target, int] | BrokenImageError | UserError:
        epoch, index = key[:2]
        path = self.split.folder / self.split.file_names[index]
        try:
            image = read_image(str(path))
        except (BrokenImageError, UserError) as error:
            return error
        assert isinstance(image, torch.Tensor)
        height, width = self.split.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            return BrokenImageError(
                printable(str(path)),
                f"{image.shape[2]}x{image.shape[1]} pixels, "
                f"but {width}x{height} in the annotations",
            )
        target = self._target(index, height, width)
        chance = torch.Generator().manual_seed(mix_seed(self.seed, epoch, index))
        if self.hflip and torch.rand((), generator=chance) < self.hflip:
            image, target = image.flip(-1), mirror(target, width)
        if len(self.sizes) > 1:
            chosen = torch.randint(len(self.sizes), (), generator=chance)
            target["min_size"] = self.sizes[int(chosen)]
        return image, target, self.split.image_ids[index]

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
                segmentation = msgspec.json.decode(split.masks[number])
                rle = coco_masks.to_rle(segmentation, height, width)
                assert rle is not None  # else `load_split` had dropped it
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

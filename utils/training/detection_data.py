"""Opens a detector's data, and makes its batches: images of their own sizes, by aspect ratio."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.config.detection import DetectionDataSettings, DetectionRecipe
from utils.data import demo_shapes
from utils.data.coco import CocoPaths, locate, shown
from utils.data.coco_dataset import CocoDataset, CocoSplit, Target, load_split
from utils.data.coco_eval import GroundTruth
from utils.data.decoding import BrokenImageError
from utils.data.loader import Loader, checked
from utils.data.sampler import Key, SeededBatches, ShardedBatches, check_batch, mix_seed
from utils.runs import resume
from utils.runs.resume import Start
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError


@dataclass(frozen=True)
class DetectionBatch:
    """Holds what one step works on."""

    images: list[torch.Tensor]  # (3, H, W) float32 from 0 to 1, each of its own size
    targets: list[Target]
    image_ids: list[int]
    broken: tuple[int, ...] = ()  # none: an image that cannot be read ends a detector's run


class GroupedBatches(SeededBatches):
    """Gives an epoch's batches, each of wide or of tall images alone, so that less is padding.

    Padding is not only waste: ECA's mean runs over it. One batch an epoch may mix the two, and the
    images that fill no last batch are left out of that epoch, others in the next.

    Args:
        sizes: (N, 2) height and width of the images.
        batch_size, seed, rank, world_size: as for SeededBatches.
    """

    def __init__(
        self, sizes: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        super().__init__(len(sizes), batch_size, seed, rank, world_size)
        self.tall = sizes[:, 0] > sizes[:, 1]

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first_step = self.epoch, self.first_step
        chance = np.random.default_rng(mix_seed(self.seed, epoch))
        order = chance.permutation(self.size)
        first_group = self.tall[order] == (chance.random() < 0.5)
        order = np.concatenate([order[first_group], order[~first_group]])
        for step in chance.permutation(self.steps)[first_step:]:
            start = step * self.batch_size + self.rank * self.share
            yield [(epoch, int(index)) for index in order[start : start + self.share]]


def match_classes(classes: list[str], split: CocoSplit, source: str) -> list[int | None]:
    """Returns the category ids that `split` gives to `classes`, in order; None for a missing one.

    Raises:
        UserError: it has a class that is not among them.
    """
    foreign = sorted(set(split.classes) - set(classes))
    if foreign or len(set(classes)) < len(classes):
        odd = shown(foreign[0]) if foreign else "a name twice"
        raise UserError(
            f"the validation annotations have {len(split.classes)} classes, {source} "
            f"{len(classes)}, and they differ in {odd}: the names must agree"
        )
    id_of = dict(zip(split.classes, split.category_ids, strict=True))
    return [id_of.get(name) for name in classes]


class ValidationSet:
    """Holds the images of a split, and the objects in them.

    Args:
        paths: of images and annotations.
        masks: whether masks are evaluated, too.
        classes: of the network, in the order of its labels.
        source: of `classes`, in words.

    Attributes:
        split: the images. truth: the objects. category_ids: of `classes`, None for one
            that the annotations lack. lines: to say of them.

    Raises:
        UserError: see `load_split`, `match_classes` and `GroundTruth`.
    """

    def __init__(self, paths: CocoPaths, masks: bool, classes: list[str], source: str):
        self.paths, self.masks = paths, masks
        self.split = load_split(paths, drop_crowds=False)
        self.category_ids = match_classes(classes, self.split, source)
        self.truth = GroundTruth(paths, masks, classes)
        self.lines = self.truth.report("val")


@dataclass(frozen=True)
class DetectionData:
    """Holds images to train on and to validate on; `digest` names the former with their objects."""

    train: CocoSplit
    val: ValidationSet
    digest: str

    @property
    def lines(self) -> list[str]:
        """Returns counts of train and val, and what a user should check."""
        return [*self.train.report("train"), *self.val.lines]


def paths_of(part: str, where: DetectionDataSettings, root: str | Path) -> CocoPaths:
    """Returns where the images and annotations of "train" or "val" are, below the data folder."""
    names = (where.val_images, where.val_annotations)
    if part == "train":
        names = (where.train_images, where.train_annotations)
    return locate(root, part, *names, where.images_anywhere)


def open_detection_data(
    where: DetectionDataSettings, recipe: DetectionRecipe, start: Start, context: Context
) -> DetectionData:
    """Opens the data and refuses what cannot be trained on, or gone on with.

    Args:
        start: the run that goes on, or a new one.

    Raises:
        UserError: one line, see `load_split`, `ValidationSet`, `check_batch` and
            `utils.runs.resume`.
    """
    saved, run = start.saved, start.run
    root = demo_shapes.find_root(str(where.data), context)
    masks = recipe.arch == "mask_rcnn"
    paths = paths_of("train", where, root)
    train = load_split(paths, masks, drop_empty=where.drop_empty)
    val = ValidationSet(
        paths_of("val", where, root), masks, train.classes, "the training annotations"
    )
    distributed.refuse_differences(
        training_images=len(train),
        validation_images=len(val.split),
        checkpoint=run and run.position,
    )
    check_batch(recipe.batch_size, len(train), context.world_size, flag="--batch-size")
    names = "\0".join(train.file_names).encode("utf-8", "backslashreplace")
    digest = resume.digest(names, train.boxes, train.labels)
    if saved is not None and list(saved.classes or ()) != list(train.classes):
        raise UserError(
            f"{paths.annotations} has other classes than the run: resume it with its data"
        )
    return DetectionData(train, val, digest)


def training_batches(
    split: CocoSplit,
    order: GroupedBatches,
    first_label: int,
    recipe: DetectionRecipe,
    seed: int,
    loader: Loader,
) -> Callable[[], Iterator[DetectionBatch]]:
    """Returns a function that begins a pass in the order that `order` was told to seek."""
    dataset = CocoDataset(split, first_label, recipe.hflip, seed, recipe.min_size)
    return partial(_device_batches, loader.open(dataset, order, _collate), loader.device)


def evaluation_batches(
    split: CocoSplit, first_label: int, loader: Loader, rank: int = 0, world_size: int = 1
) -> Callable[[], Iterator[DetectionBatch]]:
    """Returns this rank's images one by one, each exactly once over all ranks.

    One by one, as padding beside another image would change what ECA's mean sees: features far
    from the padding were seen to move by 4 %.
    """
    order = ShardedBatches(len(split), 1, rank, world_size)
    one_by_one = loader.open(CocoDataset(split, first_label), order, _collate)
    return partial(_device_batches, one_by_one, loader.device)


def _device_batches(loader: DataLoader, device: torch.device) -> Iterator[DetectionBatch]:
    for batch in checked(loader):
        if isinstance(batch, str):
            raise UserError(f"{batch}; mend the file, or take it out of the JSON", EXIT_FAILED)
        images, targets, image_ids = batch
        yield DetectionBatch(
            [image.to(device, non_blocking=True).float().div_(255) for image in images],
            [{name: _moved(value, device) for name, value in t.items()} for t in targets],
            list(image_ids),
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _collate(items: list) -> tuple | str | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
        if isinstance(item, BrokenImageError):
            return str(item)
    return tuple(zip(*items, strict=True))

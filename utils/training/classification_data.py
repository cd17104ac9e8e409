"""Opens a classifier's images for training and for evaluation, and checks them against the run."""

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from utils.config.classification import ClassificationRun, DataSettings, Recipe
from utils.data import class_order, demo_sets, image_folder, shards
from utils.data.class_order import WNID
from utils.data.image_folder import ImageFolder, describe
from utils.data.loader import Batch, ImageDataset, Loader
from utils.data.sampler import Key, SeededBatches, ShardedBatches, check_batch
from utils.data.transforms import train_transform
from utils.runs import resume
from utils.runs.checkpoint import Checkpoint, SavedRun
from utils.runs.resume import Start
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.system.files import read_json, read_text
from utils.system.text import did_you_mean, printable

BALANCED = "balanced"
REMEDY = f"{BALANCED}, or a CSV or JSON file with each class's name and weight"
SHOWN = 3  # names in a message


def class_weights(choice: str, images: ImageFolder) -> tuple[float, ...]:
    """Returns a weight for each class, in the order of labels.

    Args:
        choice: "balanced", or the path of a CSV file (lines of name,weight, with or without a
            heading) or of a JSON file (an object of names and weights).
        images: of training.

    Raises:
        UserError: a class without images cannot be balanced; the file cannot be read, a class is
            missing, unknown or named twice, or a weight is no finite number above 0.
    """
    if choice == BALANCED:
        return _balanced(images)
    is_json = Path(choice).suffix.lower() == ".json"
    weights: dict[str, float] = {}
    for name, value in _pairs_of_json(choice) if is_json else _pairs_of_csv(choice):
        if name not in images.classes:
            hint = did_you_mean(name, images.classes) or f"; {images.where} has no such folder"
            raise UserError(f"{printable(choice)}: no class {printable(name)}{printable(hint)}")
        if name in weights:
            raise UserError(f"{printable(choice)}: class {printable(name)} stands there twice")
        weights[name] = _weight(choice, name, value)
    if lacking := [name for name in images.classes if name not in weights]:
        raise UserError(f"{printable(choice)}: no weight for {_some(lacking)}; name every class")
    return tuple(weights[name] for name in images.classes)


def describe_weights(weights: Sequence[float], classes: Sequence[str]) -> str:
    """Returns one line on the smallest and the largest weight."""
    low, high = int(np.argmin(weights)), int(np.argmax(weights))
    return (
        f"class weights of the loss: {weights[low]:.4g} ({classes[low]}) to "
        f"{weights[high]:.4g} ({classes[high]})"
    )


def _balanced(images: ImageFolder) -> tuple[float, ...]:
    """Returns n / (classes · n of the class): the mean over all images is 1."""
    if empty := images.empty_classes():
        raise UserError(
            f"{images.where}: no images of {_some(empty)}, so --class-weights {BALANCED} has no "
            "weight for it; remove the folder, or give a file of weights"
        )
    counts = np.bincount(images.labels, minlength=len(images.classes))
    return tuple((len(images) / (len(counts) * counts)).tolist())


def _pairs_of_json(file: str) -> list[tuple[str, object]]:
    values = read_json(file, REMEDY)
    if not isinstance(values, dict):
        raise UserError(f"{printable(file)}: no object of class names and weights; give {REMEDY}")
    return list(values.items())


def _pairs_of_csv(file: str) -> list[tuple[str, object]]:
    text = read_text(file, REMEDY)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{printable(file)}: no usable CSV ({error}); give {REMEDY}") from None
    for row in rows:
        if len(row) != 2:
            line = printable(",".join(row))[:60]
            raise UserError(f"{printable(file)}: {line!r} is not a class name and a weight")
    if rows and rows[0][1].strip().lower() == "weight":
        rows = rows[1:]
    return [(name, weight.strip()) for name, weight in rows]


def _weight(file: str, name: str, value: Any) -> float:
    """Returns a weight as a number, from the text of a CSV file or the number of a JSON file."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"{printable(file)}: the weight of {printable(name)}, {printable(str(value))[:40]!r}, "
            "is not a finite number above 0"
        )
    return number


def _some(names: Sequence[str]) -> str:
    shown = printable(", ".join(names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


NUMBER = re.compile(rb"ILSVRC2012_val_(\d{8})(?!\d)")  # of an image, in its file's name


class RealMeter:
    """Sums, on the device, the predictions that are among an image's labels.

    Args:
        sets: (n, most) int64 labels of each image, see `read`.
        labels: (n,) int64 the label that each image's folder says.
    """

    def __init__(self, sets: np.ndarray, labels: np.ndarray, device: torch.device):
        self.sets = torch.from_numpy(sets).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.sums = torch.zeros(2, dtype=torch.int64, device=device)  # right, counted

    @torch.no_grad()
    def count(self, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Adds a batch, and returns the labels (N,) of its folders.

        Args:
            logits: (N, C). A row that is not finite is never right.
            numbers: (N,) which of the n images each row is of.
        """
        sets = self.sets[numbers]
        hits = (logits.argmax(1)[:, None] == sets).any(1) & logits.isfinite().all(1)
        self.sums += torch.stack([hits.sum(), (sets >= 0).any(1).sum()])
        return self.labels[numbers]

    def figures(self) -> dict[str, float]:
        """Returns {"real_top1" in %, "real_images"} over all ranks. Call it on every rank."""
        right, counted = distributed.all_reduce(self.sums.clone()).tolist()
        return {"real_top1": 100 * right / counted, "real_images": counted}


def read_real_labels(file: str, images: ImageFolder, names: Sequence[str]) -> np.ndarray:
    """Reads each image's labels by the number in its file's name.

    Args:
        file: real.json as published: a list of lists of class numbers, the first that of image 1. A
            class's number is its position among the sorted WordNet numbers.
        images: ImageNet's validation images, or some of them.
        names: of the network's outputs: WordNet numbers, in any order.

    Returns:
        (n, most) int64 outputs of the network, filled up with -1.

    Raises:
        UserError: another file, other images or other classes.
    """
    try:
        table = msgspec.json.decode(Path(file).read_bytes(), type=list[list[int]])
        sets = _sets(table, images, names)
    except OSError as error:
        fault = f"{error.strerror}; give the file real.json"
    except (msgspec.DecodeError, RecursionError):
        fault = "not a JSON list of lists of class numbers; give real.json as published"
    except ValueError as error:
        fault = str(error)
    else:
        return sets
    raise UserError(f"--real-labels {printable(file)}: {fault}")


def _sets(table: list[list[int]], images: ImageFolder, names: Sequence[str]) -> np.ndarray:
    if not all(WNID.fullmatch(name) for name in names):
        raise ValueError(
            "its class numbers count ImageNet's sorted WordNet numbers (n01440764, …), and the "
            "network's classes have other names; --class-names FILE gives them to weights without "
            "names"
        )
    for number, labels in enumerate(table, 1):
        if strange := [label for label in labels if not 0 <= label < len(names)]:
            raise ValueError(
                f"image {number} has class {strange[0]}, and the network has 0 to "
                f"{len(names) - 1}; give a network of ImageNet's classes"
            )
    output = {rank: names.index(name) for rank, name in enumerate(sorted(names))}
    chosen: dict[int, list[int]] = {}
    for path in images.paths.tolist():
        match = NUMBER.match(os.path.basename(path))
        if match is None or not (number := int(match[1])):
            raise ValueError(
                f"{printable(path)} is not named ILSVRC2012_val_ and a number, as ImageNet's "
                "validation images are; give these as DATA"
            )
        if number in chosen:
            raise ValueError(f"the data has image {number} more than once; give each once")
        chosen[number] = []
    if (most := max(chosen)) > len(table):
        raise ValueError(
            f"has labels for {len(table):,} images, and the data has image {most:,}; give the "
            "whole file"
        )
    chosen = {number: [output[label] for label in table[number - 1]] for number in chosen}
    width = max(map(len, chosen.values()))
    if not width:
        raise ValueError("none of these images has a label; give the whole file")
    rows = [labels + [-1] * (width - len(labels)) for labels in chosen.values()]
    return np.array(rows, np.int64)


@dataclass(frozen=True)
class TrainingData:
    """Holds images to train on and to validate on; `digest` names the former.

    `class_weights` are those of the loss, by label; None for 1.
    """

    train: ImageFolder
    val: ImageFolder
    digest: str
    class_weights: tuple[float, ...] | None = None

    @property
    def classes(self) -> Sequence[str]:
        """Returns the classes' names, in the order of labels."""
        return self.train.classes

    def lines(self) -> list[str]:
        """Returns counts of train and val, what a user should check, and the class weights."""
        lines = [*describe(self.train, "train"), *describe(self.val, "val")]
        if self.class_weights is not None:
            lines.append(describe_weights(self.class_weights, self.val.classes))
        return lines

    def order(self, recipe: Recipe, seed: int, context: Context) -> SeededBatches:
        """Returns the order of this rank's training batches, a function of the epoch."""
        labels = self.train.labels if recipe.sampler == "balanced" else None
        return SeededBatches(
            len(self.train),
            recipe.batch_size,
            seed,
            context.rank,
            context.world_size,
            recipe.repeats,
            labels,
        )


def open_training_data(
    where: DataSettings, recipe: Recipe, weights: str | None, start: Start, context: Context
) -> TrainingData:
    """Opens the data and refuses what cannot be trained on, or gone on with.

    Args:
        weights: --class-weights as it was typed; None for those of the run that goes on, if any.
        start: the run that goes on, or a new one.

    Raises:
        UserError: one line, see `find_root`, `open_split`, `check_batch` and `utils.runs.resume`.
    """
    saved, run = start.saved, start.run
    root = demo_sets.find_root(str(where.data), context, where.data_files, where.download)
    classes = None if saved is None else saved.classes
    train, val = shards.open_split(str(root), classes, val_split=recipe.val_split)
    assert train is not None  # unless it were left out
    distributed.refuse_differences(
        training_images=len(train),
        validation_images=len(val),
        checkpoint=run and run.position,
    )
    check_batch(
        recipe.batch_size,
        len(train),
        context.replicas,
        recipe.crop_size,
        recipe.accumulate,
        recipe.repeats,
    )
    digest = resume.digest(train.paths, train.labels)
    if recipe.sync_bn:
        distributed.refuse_sync_bn(context)
    return TrainingData(train, val, digest, _loss_weights(weights, saved, train))


def _loss_weights(
    typed: str | None, saved: Checkpoint | None, train: ImageFolder
) -> tuple[float, ...] | None:
    """Returns the loss's weights by label: those that the run was saved with, where it goes on.

    Raises:
        UserError: other weights are typed than the run's, or as in `class_weights`.
    """
    if saved is None or saved.run is None:
        return None if typed is None else class_weights(typed, train)
    weights, name = saved.class_weights, saved.run.flags.get("class_weights")
    if typed not in (None, name):
        raise UserError(
            f"the run's class weights are {printable(name or 'none')}: leave --class-weights "
            f"{printable(typed)} out"
        )
    if weights is None:
        return None
    if typed not in (None, BALANCED) and class_weights(str(typed), train) != tuple(weights):
        raise UserError(
            f"{printable(typed)} holds other weights than the run began with: leave "
            "--class-weights out to go on with those"
        )
    if len(weights) != len(train.classes):
        raise UserError(
            f"{saved.file}: holds {len(weights)} class weights for {len(train.classes)} classes; "
            "give a checkpoint as the scripts write it"
        )
    return tuple(weights)


class ChosenOutputs(nn.Module):
    """Gives some of a network's outputs: (N, 3, S, S) → (N, k)."""

    outputs: torch.Tensor

    def __init__(self, network: nn.Module, outputs: np.ndarray, device: torch.device):
        super().__init__()
        self.network = network
        self.register_buffer("outputs", torch.from_numpy(outputs).to(device), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits.index_select(1, self.outputs)


@dataclass(frozen=True)
class EvaluationData:
    """Holds images with labels, and how a network's outputs are compared with them.

    Args:
        images: `labels` count the outputs that are compared, `classes` are their names.
        outputs: (k,) int64 those of the network that are compared; None for all.
        real: (n, most) the labels of the images anew, see `read`, or None.
        notes: lines on how folders and outputs were matched.
    """

    images: ImageFolder
    outputs: np.ndarray | None = None
    real: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns lines on the images, and on all that a reader of the figures must know."""
        return [*describe(self.images, "val"), *(f"  {note}" for note in self.notes)]

    def compared(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Returns the network with the outputs alone that are compared."""
        return network if self.outputs is None else ChosenOutputs(network, self.outputs, device)

    def meter(self, device: torch.device) -> RealMeter | None:
        """Returns what counts by the labels anew, or None."""
        return None if self.real is None else RealMeter(self.real, self.images.labels, device)

    def as_read(self) -> ImageFolder:
        """Returns the images as a loader takes them: for `meter`, labels are images' numbers."""
        if self.real is None:
            return self.images
        return replace(self.images, labels=np.arange(len(self.images)))


def open_evaluation_data(
    where: DataSettings, run: ClassificationRun, saved: Checkpoint, outputs: int, context: Context
) -> EvaluationData:
    """Opens the images on which a checkpoint is evaluated.

    DATA is a folder with val/, or the folder of class folders or shards itself.

    Args:
        saved: the checkpoint; the images are labelled by its class names.
        outputs: of its network.

    Raises:
        UserError: one line; see `shards.open_images`, `class_order` and `read_real_labels`; or a
            flag that does nothing with this checkpoint and these data.
    """
    names = saved.classes
    data = str(demo_sets.find_root(str(where.data), context, where.data_files, where.download))
    if run.class_names is not None:
        if names is not None:
            raise UserError(
                f"--class-names is for weights without class names, and {saved.file} has its own: "
                "leave it out"
            )
        names = class_order.read_names(run.class_names, outputs)
    root = class_order.evaluation_folder(data)
    order = class_order.match(root, names, outputs, str(saved.file))
    images = replace(shards.open_images(root, order.folders), classes=order.names)
    if saved.run is not None and root == data:
        images = _validation_part(images, saved.run)
    distributed.refuse_differences(validation_images=len(images))
    real = run.real_labels
    labels = None if real is None else read_real_labels(real, images, order.names)
    opened = EvaluationData(images, None, labels, order.notes)
    return _restricted(opened, run.present_classes)


def _validation_part(images: ImageFolder, run: SavedRun) -> ImageFolder:
    """Returns the images that a run with --val-split has not trained on; all of another folder.

    Raises:
        UserError: the run's own folder has other images than it had.
    """
    share = run.recipe.get("val_split", 0.0)
    if not isinstance(share, float) or not 0 < share < 1:
        return images
    train, val = image_folder.split(images, share)
    if resume.digest(train.paths, train.labels) == run.train_digest:
        return val
    if os.path.realpath(images.root) != os.path.realpath(str(run.flags.get("data"))):
        return images
    raise UserError(
        f"{images.where}: other images than the run was trained on, so those of its --val-split "
        f"{share:g} cannot be told from them; restore them, or give a folder with val/"
    )


def _restricted(data: EvaluationData, present_classes: bool) -> EvaluationData:
    """Leaves out, if asked to, the classes that the data has no image of; says what is compared."""
    images, notes = data.images, data.notes
    present, labels = np.unique(images.labels, return_inverse=True)
    here, known = len(present), len(images.classes)
    if present_classes and here == known:
        raise UserError(
            f"--present-classes does nothing here: {images.where} has images of all {known:,} "
            "classes; leave it out"
        )
    if present_classes and here == 1:
        raise UserError(f"--present-classes: {images.where} has one class, nothing to compare")
    if present_classes:
        classes = tuple(images.classes[number] for number in present)
        chosen = replace(images, labels=labels.astype(np.int64), classes=classes)
        note = f"{here:,} of the network's {known:,} classes: only their outputs are compared"
        return replace(data, images=chosen, outputs=present, notes=(*notes, note))
    if here < known:
        note = (
            f"all {known:,} outputs are compared; --present-classes compares those of the {here:,} "
            "classes alone, as published for ImageNet-A and ImageNet-R"
        )
        return replace(data, notes=(*notes, note))
    return data


def training_batches(
    images: ImageFolder,
    order: SeededBatches | list[list[Key]],
    recipe: Recipe,
    seed: int,
    loader: Loader,
    skip_broken: bool = False,
) -> Callable[[], Iterator[Batch]]:
    """Returns a function that begins a pass over augmented batches, in the order of `order`."""
    transform = train_transform(
        recipe.crop_size,
        recipe.min_scale,
        recipe.hflip,
        recipe.auto_augment,
        recipe.random_erasing,
        recipe.vflip,
        recipe.colour,
        recipe.interpolation,
        recipe.preprocessing.mean,
    )
    dataset = ImageDataset(images, transform, seed, loader.decoder, skip_broken)
    return loader.batches(dataset, order, recipe.preprocessing)


def validation_batches(
    images: ImageFolder, recipe: Recipe, loader: Loader, rank: int = 0, world_size: int = 1
) -> Callable[[], Iterator[Batch]]:
    """Returns this rank's share of the validation images, each exactly once over all ranks."""
    look = recipe.preprocessing
    keys = validation_order(len(images), recipe.batch_size, rank, world_size)
    return loader.batches(ImageDataset(images, look, decoder=loader.decoder), keys, look)


def validation_order(
    images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> ShardedBatches:
    """Returns in which order `validation_batches` gives a rank its images.

    Args:
        images: over all ranks.
        batch_size: of all ranks together.
    """
    return ShardedBatches(images, max(1, batch_size // world_size), rank, world_size)


def replaced_lines(folder: ImageFolder, broken: Sequence[int]) -> list[str]:
    """Returns lines on images that could not be read: how many times, and each path once."""
    if not broken:
        return []
    paths = [printable(folder.path(index)) for index in sorted(set(broken))]
    return [f"{len(broken)} times an image that cannot be read was replaced:", *paths]

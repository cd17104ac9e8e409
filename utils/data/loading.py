"""Makes normalised batches on the device from image files.

Workers decode, crop and flip 8-bit images; the division by the standard deviation happens on the
device, on a batch that crossed the bus at a quarter of its float size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils.data.decoding import BrokenImageError, prepare_for_workers, read_image, to_tensor
from utils.data.image_folder import ImageFolder
from utils.data.loader_workers import checked, init_worker
from utils.data.sampler import Key, SeededBatches, ShardedBatches, mix_seed
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform, train_transform
from utils.recipes.classification import Recipe
from utils.system.errors import UserError
from utils.system.text import printable

Loaded = tuple[torch.Tensor, torch.Tensor, list[int]]  # images, targets, broken: of a `Batch`
REPLACEMENT_TRIES = 100  # consecutive broken files after which skipping gives up


@dataclass(frozen=True)
class Batch:
    """Holds what one step works on."""

    images: torch.Tensor  # (N, 3, S, S) float32, normalised
    targets: torch.Tensor  # (N,) int64
    broken: Sequence[int]  # indices of images that were replaced because they could not be read


class ImageDataset(Dataset):
    """Gives the images of a folder by key, as (uint8 (3, S, S), label, broken index or -1).

    Args:
        folder: what to read.
        transform: applied to the decoded image.
        seed: makes random transforms a pure function of (seed, key), so that neither the number of
            workers nor an interruption changes them; None for transforms without chance.
        decoder: see `read_image`.
        skip_broken: take the next readable image in the place of a broken one, and report it.

    A broken image comes back as a value, not as an exception, and so does a fault of the storage,
    which nothing replaces: what a worker raises arrives as a traceback, without the path.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: Callable[[Any], Any],
        seed: int | None = None,
        decoder: str = "torchvision",
        skip_broken: bool = False,
    ):
        self.folder, self.transform, self.seed = folder, transform, seed
        self.decoder, self.skip_broken = decoder, skip_broken

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int, int] | BrokenImageError | UserError:
        item = self.read(key, self.decoder)
        if isinstance(item, Exception):
            return item
        image, label, broken = item
        return self.view(image, key), label, broken

    def read(
        self, key: Key, decoder: str
    ) -> tuple[torch.Tensor | Image.Image, int, int] | BrokenImageError | UserError:
        """Returns what the decoder gives for a key, label, and broken index or -1; or a fault."""
        wanted = key[1]
        tries = REPLACEMENT_TRIES if self.skip_broken else 1
        for attempt in range(tries):
            index = (wanted + attempt) % len(self.folder)
            try:
                image = read_image(self.folder.path(index), decoder)
            except UserError as error:
                return error
            except BrokenImageError as error:
                failure = error
            else:
                return image, int(self.folder.labels[index]), -1 if index == wanted else wanted
        failure.can_be_skipped = self.seed is not None and not self.skip_broken  # in training
        return failure

    def view(self, image: torch.Tensor | Image.Image, key: Key) -> torch.Tensor:
        """Transforms a decoded image as its key says: uint8 (3, S, S), on the image's device."""
        if self.seed is None:
            image = self.transform(image)
        else:
            # Not torch.manual_seed: that would also reseed the accelerators.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix_seed(self.seed, *key))
                image = self.transform(image)
        if not isinstance(image, torch.Tensor):
            image = to_tensor(image)
        return image


@dataclass(frozen=True)
class Reading:
    """Describes how files become batches, the same in training and validation."""

    device: torch.device
    workers: int  # loader processes; 0 reads in this one
    timeout: float = 0  # seconds without a batch until workers count as hung; 0 waits for ever
    decoder: str = "torchvision"
    memory_format: torch.memory_format = torch.contiguous_format

    def batches(
        self, dataset: ImageDataset, keys: Sampler[list[Key]]
    ) -> Callable[[], Iterator[Batch]]:
        """Returns a function that begins a pass over `dataset` in the order of `keys`.

        The workers stay alive from one pass to the next.
        """
        return self._passes(dataset, keys, _collate, tuple)

    def _passes(
        self,
        dataset: Dataset,
        keys: Sampler[list[Key]],
        collate: Callable[[list], Any],
        finish: Callable[[Any], Loaded],
    ) -> Callable[[], Iterator[Batch]]:
        """Returns a function that begins a pass; workers run `collate`, the device `finish`."""
        prepare_for_workers(self.workers, self.decoder)
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.workers > 0,
            worker_init_fn=init_worker,
            timeout=self.timeout if self.workers else 0,
            # Its own generator: else every pass would draw from the global one.
            generator=torch.Generator(),
        )
        return partial(device_batches, loader, self.device, self.memory_format, finish)


def training_batches(
    images: ImageFolder,
    order: SeededBatches,
    recipe: Recipe,
    seed: int,
    reading: Reading,
    skip_broken: bool = False,
) -> Callable[[], Iterator[Batch]]:
    """Returns a function that begins a pass over augmented batches, in the order of `order`."""
    transform = train_transform(
        recipe.crop_size,
        recipe.min_scale,
        recipe.hflip,
        recipe.auto_augment,
        recipe.random_erasing,
    )
    dataset = ImageDataset(images, transform, seed, reading.decoder, skip_broken)
    return reading.batches(dataset, order)


def validation_batches(
    images: ImageFolder, recipe: Recipe, reading: Reading, rank: int = 0, world_size: int = 1
) -> Callable[[], Iterator[Batch]]:
    """Returns this rank's share of the validation images, each exactly once over all ranks."""
    transform = eval_transform(recipe.img_size, recipe.crop_pct)
    keys = validation_order(len(images), recipe.batch_size, rank, world_size)
    return reading.batches(ImageDataset(images, transform, decoder=reading.decoder), keys)


def validation_order(
    images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> ShardedBatches:
    """Returns in which order `validation_batches` gives a rank its images.

    Args:
        images: over all ranks.
        batch_size: of all ranks together.
    """
    return ShardedBatches(images, max(1, batch_size // world_size), rank, world_size)


def device_batches(
    loader: DataLoader,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    finish: Callable[[Any], Loaded] = tuple,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Iterator[Batch]:
    """Iterates over `loader` with each batch on `device` and normalised.

    On CUDA the next batch is copied on a side stream while the present one is worked on.

    Args:
        finish: makes of what the loader gives, in that stream, uint8 images (N, 3, S, S), targets
            (N,) and broken indices; by default the loader gives these.

    Raises:
        UserError: a broken image (with its path), or a loader worker that hangs. (One that died is
            an exception that can arise anywhere, see `faults.in_one_line`.)
    """
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    scale, shift = (torch.tensor(v, device=device) for v in (scale, shift))

    def move(images: torch.Tensor, targets: torch.Tensor, broken: list[int]) -> Batch:
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        return Batch(_scaled(images, scale, shift, memory_format), targets, broken)

    if device.type != "cuda":
        for host in checked(loader):
            yield move(*finish(host))
        return
    stream = torch.cuda.Stream(device)
    ready = None
    for host in checked(loader):
        with torch.cuda.stream(stream):
            coming = move(*finish(host))
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in (coming.images, coming.targets):
            tensor.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready


def _scaled(
    images: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, memory_format
) -> torch.Tensor:
    """Returns uint8 images (N, 3, H, W) · scale + shift, both (3,), as float32 in that format."""
    if memory_format != torch.channels_last:
        images = images.to(torch.float32, memory_format=memory_format)
        return images.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))
    # By whole rows of pixels: a loop over three numbers takes a CPU four times as long.
    rows = images.permute(0, 2, 3, 1).flatten(2).float()
    scale, shift = (t.repeat(images.shape[3]) for t in (scale, shift))
    return rows.mul_(scale).add_(shift).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def _collate(items: list) -> Loaded | BrokenImageError | UserError:
    for item in items:
        if isinstance(item, BrokenImageError | UserError):
            return item
    images, labels, broken = zip(*items, strict=True)
    # Stacked as decoders leave them, channels innermost: turning them round takes a worker half as
    # long as the crop, and the device that gets them next to nothing.
    pixels = [image.permute(1, 2, 0) for image in images]
    if all(p.is_contiguous() for p in pixels):
        stacked = default_collate(pixels).permute(0, 3, 1, 2)
    else:
        stacked = default_collate(images)
    return stacked, torch.tensor(labels), [i for i in broken if i >= 0]


def replaced_lines(folder: ImageFolder, broken: Sequence[int]) -> list[str]:
    """Returns lines on images that could not be read: how many times, and each path once."""
    if not broken:
        return []
    paths = [printable(folder.path(index)) for index in sorted(set(broken))]
    return [f"{len(broken)} times an image that cannot be read was replaced:", *paths]

"""Orders a run's samples by a pure function of (seed, epoch, step, rank).

Nothing here remembers anything: an interrupted run finds its place again from three integers,
whatever the number of loader workers, and every number of ranks sees the same global batches.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.system.errors import UserError

SAMPLERS = ("shuffle", "balanced")
# (epoch, index of the image), and from the second copy on the copy's number: all that a sample's
# augmentation depends on.
Key = tuple[int, int] | tuple[int, int, int]


def mix_seed(*numbers: int) -> int:
    """Returns one 63-bit seed from several non-negative integers; any change gives an unrelated
    seed.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededBatches(Sampler[list[Key]]):
    """Gives the batches of a training epoch: one shuffle per epoch, cut into global batches.

    Rank r takes the r-th slice of each global batch. The images that do not fill a last batch are
    left out of that epoch (another shuffle, others left out), so every step has the same size.

    With `repeats` above 1 (repeated augmentation, Berman et al. 2019, Hoffer et al. 2020) a global
    batch holds that many copies of each of its images, each augmented by its own chance, and an
    epoch of as many steps sees one image in `repeats`. The copies come in rounds, each in another
    order, so that mixing, which pairs neighbours, meets other pairs in each round; where the batch
    does not divide, the last round is cut short. Where the number of ranks is a multiple of
    `repeats`, no rank sees an image twice in a step, as in torchvision; with another number some
    slices reach into the next round, as the global batch is the same for every number of ranks.

    With `labels` the order is `balanced_order`: each class comes alike, whatever its size, in as
    many steps. An image that comes again in an epoch does so with its next copy's number.

    Args:
        batch_size: global batch; must divide by `world_size` and not exceed `size`.
        seed, rank, world_size: what the order and the slice depend on.
        repeats: copies of each image in a batch.
        labels: (size,) the images' classes; None for each image once.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        labels: np.ndarray | None = None,
    ):
        assert batch_size % world_size == 0
        assert batch_size <= size
        self.size, self.batch_size, self.seed, self.repeats = size, batch_size, seed, repeats
        self.rank, self.share = rank, batch_size // world_size
        self.labels = labels
        self.epoch = self.first_step = 0

    @property
    def steps(self) -> int:
        """Returns the number of steps of a whole epoch."""
        return self.size // self.batch_size

    def seek(self, epoch: int, step: int = 0) -> None:
        """Lets the next iteration begin at `step` of `epoch`."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first_step = self.epoch, self.first_step
        shuffle = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        distinct = -(-self.batch_size // self.repeats)
        if self.labels is None:
            order = torch.randperm(self.size, generator=shuffle)
            earlier = torch.zeros_like(order)
        else:
            order, earlier = balanced_order(self.labels, self.steps * distinct, shuffle)
        for step in range(first_step, self.steps):
            own = slice(step * distinct, (step + 1) * distinct)
            images, copies = order[own], earlier[own] * self.repeats
            keys = _keys(epoch, images, copies)
            if self.repeats > 1:
                shuffle.manual_seed(mix_seed(self.seed, epoch, step, self.repeats))
            for copy in range(1, self.repeats):
                again = torch.randperm(distinct, generator=shuffle)
                keys += _keys(epoch, images[again], copies[again] + copy)
            yield keys[self.rank * self.share : (self.rank + 1) * self.share]


def _keys(epoch: int, images: torch.Tensor, copies: torch.Tensor) -> list[Key]:
    pairs = zip(images.tolist(), copies.tolist(), strict=True)
    return [(epoch, index, copy) if copy else (epoch, index) for index, copy in pairs]


def balanced_order(
    labels: np.ndarray, count: int, chance: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws images so that no class comes more than once oftener than another.

    The order is made of rounds, in each of which every class that has images comes once, the
    classes in an order of the round's own. A class gives its images in shuffles, one after another.

    Args:
        count: of images to draw.

    Returns:
        (count,) indices of images, and (count,) how often each of them was drawn before.
    """
    counts = np.bincount(labels)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    members = [torch.from_numpy(own) for own in by_class if len(own)]
    rounds = -(-count // len(members))
    images, earlier = [], []
    for own in members:
        passes = range(-(-rounds // len(own)))
        shuffles = [own[torch.randperm(len(own), generator=chance)] for _ in passes]
        images.append(torch.cat(shuffles)[:rounds])
        earlier.append(torch.arange(rounds) // len(own))
    turns = torch.rand(rounds, len(members), generator=chance).argsort(dim=1, stable=True)
    drawn = [torch.stack(parts, dim=1).gather(1, turns) for parts in (images, earlier)]
    return drawn[0].flatten()[:count], drawn[1].flatten()[:count]


class ShardedBatches(Sampler[list[Key]]):
    """Gives the batches of an evaluation: every image exactly once over all ranks, no padding."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, size, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def check_batch(
    batch_size: int,
    images: int,
    replicas: int,
    img_size: int | None = None,
    accumulate: int = 1,
    repeats: int = 1,
    flag: str = "-b",
) -> None:
    """Refuses, before the run starts, a batch that cannot be trained on.

    Args:
        batch_size: global.
        images: in the training set.
        replicas: devices that the batch is divided over.
        img_size: a classifier's pixels; at most 32 leave a last feature map of one pixel.
        accumulate: parts that a device takes one after the other.
        repeats: copies of each image in a batch.
        flag: what the script calls the batch.

    Raises:
        UserError: it does not divide, is larger than the data, or leaves BatchNorm one value.
    """
    if repeats > batch_size:
        raise UserError(
            f"--repeats {repeats} is more than the batch, -b {batch_size}: give at most that"
        )
    if batch_size % replicas:
        lower = batch_size // replicas * replicas
        near = [str(n) for n in (lower, lower + replicas) if n]
        raise UserError(
            f"{flag} {batch_size} is the global batch and does not divide over {replicas} devices: "
            f"give {' or '.join(near)}"
        )
    if batch_size % (replicas * accumulate):
        raise UserError(
            f"-b {batch_size} on {replicas} device{'s' * (replicas > 1)} does not divide into "
            f"--accumulate {accumulate} parts: give a multiple of {replicas * accumulate}"
        )
    if batch_size > images:
        recipe = ", or --recipe finetune for few images" * (images >= 32)
        lr = "" if img_size is None else f" and a lower --lr{recipe}"
        raise UserError(
            f"{flag} {batch_size} is more than the {images} training images: give {flag} "
            f"{max(2, min(32, images // 4))}{lr}"
        )
    if img_size is not None and img_size <= 32 and batch_size == replicas * accumulate:
        raise UserError(
            f"-b {batch_size} leaves one image at a time per device, whose last feature map is one "
            f"pixel at {img_size} pixels: BatchNorm needs two values, so give "
            f"-b {2 * replicas * accumulate} or more"
        )

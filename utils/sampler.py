"""The order of a run's samples as a pure function of (seed, epoch, step, rank).

Nothing here remembers anything: an interrupted run finds its place again from three integers,
whatever the number of loader workers, and every number of ranks sees the same global batches.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.errors import UserError

Key = tuple[int, int]  # (epoch, index of the image): all that a sample's augmentation depends on


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several non-negative integers; any change gives an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededBatches(Sampler[list[Key]]):
    """Batches of a training epoch: one shuffle per epoch, cut into global batches.

    Rank r takes the r-th slice of each global batch. The images that do not fill a last batch are
    left out of that epoch (another shuffle, others left out), so every step has the same size.

    Args:
        size: number of images.
        batch_size: global batch; must divide by `world_size` and not exceed `size`.
        seed, rank, world_size: what the order and the slice depend on.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        assert batch_size % world_size == 0
        assert batch_size <= size
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.epoch = self.first_step = 0

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.size // self.batch_size

    def seek(self, epoch: int, step: int = 0) -> None:
        """Lets the next iteration begin at `step` of `epoch`."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first_step = self.epoch, self.first_step
        shuffle = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(self.size, generator=shuffle)
        for step in range(first_step, self.steps):
            start = step * self.batch_size + self.rank * self.share
            yield [(epoch, index) for index in order[start : start + self.share].tolist()]


class ShardedBatches(Sampler[list[Key]]):
    """Batches for evaluation: every image exactly once over all ranks, in order, none padded."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, size, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def check_batch(batch_size: int, images: int, replicas: int, img_size: int) -> None:
    """Refuses, before the run starts, a batch that cannot be trained on.

    Args:
        batch_size: global.
        images: in the training set.
        replicas: devices that the batch is divided over.
        img_size: pixels; at most 32 leave a last feature map of one pixel.

    Raises:
        UserError: it does not divide, is larger than the data, or leaves BatchNorm one value.
    """
    if batch_size % replicas:
        lower = batch_size // replicas * replicas
        near = [str(n) for n in (lower, lower + replicas) if n]
        raise UserError(
            f"-b {batch_size} is the global batch and does not divide over {replicas} devices: "
            f"give {' or '.join(near)}"
        )
    if batch_size > images:
        raise UserError(f"-b {batch_size} is more than the {images} training images: give fewer")
    if batch_size == replicas and img_size <= 32:
        raise UserError(
            f"-b {batch_size} leaves one image per device, whose last feature map is one pixel at "
            f"--img-size {img_size}: BatchNorm needs two values, so give -b {2 * replicas} or more"
        )

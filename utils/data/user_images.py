"""Finds the images that a user names on the command line, and reads them in batches."""

import glob
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from utils.data.decoding import (
    EXTENSIONS,
    BrokenImageError,
    Stored,
    prepare_for_workers,
    read_image,
    to_tensor,
)
from utils.data.image_folder import is_passed_over
from utils.data.loader_workers import leave_broken_connections_unsaid
from utils.data.loading import device_batches, eval_transform
from utils.system.errors import UserError
from utils.system.text import printable


@dataclass(frozen=True)
class UserBatch:
    """Holds some of the images, and for the others why they could not be read."""

    images: torch.Tensor  # (n, 3, S, S) float32, normalised; n can be 0
    indices: list[int]  # (n,) where in the list of paths each image is from
    broken: list[tuple[int, str]]  # index and reason of those that cannot be read


def find_images(names: Sequence[str]) -> list[bytes]:
    """Returns the paths that `names` stand for, each once, in the order given.

    Args:
        names: files; folders, which stand for all images below them, sorted; glob patterns (`**`
            crosses folders); or "-" for one path a line on standard input, there or not.

    Raises:
        UserError: a name that stands for nothing.
    """
    found: dict[bytes, None] = {}
    for name in names:
        if name == "-":
            lines = [line.rstrip(b"\r\n") for line in sys.stdin.buffer]
            here = [line for line in lines if line]  # one that is gone is told when it is read
            nothing = "no path came in on standard input"
        elif os.path.isdir(name):
            here = _images_below(os.fsencode(name))
            nothing = f"{printable(name)}: no image below this folder ({' '.join(EXTENSIONS)})"
        elif os.path.exists(name):  # before patterns: names may hold brackets
            here = [os.fsencode(name)]
            nothing = ""
        else:
            paths = sorted(glob.glob(name, recursive=True))
            here = [os.fsencode(path) for path in paths if os.path.isfile(path)]
            nothing = f"{printable(name)}: no such file, folder or pattern that matches a file"
        if not here:
            raise UserError(nothing)
        found.update(dict.fromkeys(here))
    return list(found)


def _images_below(folder: bytes) -> list[bytes]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_passed_over(os.fsdecode(name))]
        for name in files:
            if os.fsdecode(name).lower().endswith(EXTENSIONS) and not name.startswith(b"."):
                found.append(os.path.join(root, name))
    return sorted(found)


class _Paths(Dataset):
    def __init__(
        self, paths: Sequence[bytes | Stored], img_size: int, crop_pct: float, decoder: str
    ):
        self.paths, self.decoder = paths, decoder
        self.transform = eval_transform(img_size, crop_pct)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str] | UserError:
        try:
            image = self.transform(read_image(self.paths[index], self.decoder))
        except BrokenImageError as error:
            return index, error.reason
        except UserError as error:  # raised in a worker it would arrive as a traceback
            return error
        if not isinstance(image, torch.Tensor):
            image = to_tensor(image)
        return index, image


def read_batches(
    paths: Sequence[bytes | Stored],
    img_size: int,
    crop_pct: float,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    decoder: str = "torchvision",
) -> Iterator[UserBatch]:
    """Yields the images at `paths` in order, prepared as for evaluation, on `device`.

    Args:
        img_size, crop_pct: see `eval_transform`.
        workers: loader processes; 0 reads in this one.
        decoder: see `read_image`.
    """
    prepare_for_workers(workers, decoder)
    loader = DataLoader(
        _Paths(paths, img_size, crop_pct, decoder),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=partial(_collate, img_size=img_size),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_interrupts_to_the_main_process,
    )
    for batch in device_batches(loader, device):
        yield UserBatch(batch.images, batch.targets.tolist(), list(batch.broken))


def _collate(items: list[tuple[int, torch.Tensor | str] | UserError], img_size: int):
    if faults := [item for item in items if isinstance(item, UserError)]:
        return faults[0]
    broken = [item for item in items if isinstance(item[1], str)]
    good = [item for item in items if not isinstance(item[1], str)]
    images = torch.empty(len(good), img_size, img_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for place, (_, image) in zip(images, good, strict=True):
        place.copy_(image)
    return images, torch.tensor([index for index, _ in good], dtype=torch.int64), broken


def _leave_interrupts_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_broken_connections_unsaid()

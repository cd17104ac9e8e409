"""Makes normalised batches on the device from image files, read by worker processes.

Workers decode, crop and flip 8-bit images; the division by the standard deviation happens on the
device, on a batch that crossed the bus at a quarter of its float size.
"""

import errno
import functools
import multiprocessing
import os
import resource
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from utils.data.decoding import DECODERS, BrokenImageError, read_image, to_tensor
from utils.data.image_folder import ImageFolder
from utils.data.sampler import Key, mix_seed
from utils.data.transforms import Preprocessing
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.processes import PATIENCE, die_with_parent, end_children_at_exit, processors

Loaded = tuple[Tensor, Tensor, list[int]]  # images, targets, broken: of a `Batch`
USUAL = Preprocessing()
REPLACEMENT_TRIES = 100  # consecutive broken files after which skipping gives up
BEGUN: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()  # those that may have workers
FILES = 8  # open files of this process for each worker, its queues and the batches on their way


@dataclass(frozen=True)
class Batch:
    """Holds what one step works on."""

    images: Tensor  # (N, 3, S, S) float32, normalised
    targets: Tensor  # (N,) int64
    broken: Sequence[int]  # indices of images that were replaced because they could not be read


class ImageDataset(Dataset[Any]):
    """Gives the images of a folder by key, as (uint8 (3, S, S), label, broken index or -1).

    Args:
        seed: makes random transforms a pure function of (seed, key), so that neither the number of
            workers nor an interruption changes them; None for transforms without chance.
        skip_broken: take the next readable image in the place of a broken one, and report it.

    A broken image comes back as a value, not as an exception, and so does a fault of the storage,
    which nothing replaces: what a worker raises arrives as a traceback, without the path.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: Callable[[Any], Any],
        seed: int | None = None,
        decoder: str = DECODERS[0],
        skip_broken: bool = False,
    ):
        self.folder, self.transform, self.seed = folder, transform, seed
        self.decoder, self.skip_broken = decoder, skip_broken

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int] | BrokenImageError | UserError:
        for attempt in range(REPLACEMENT_TRIES if self.skip_broken else 1):
            index = (key[1] + attempt) % len(self.folder)
            try:
                image = read_image(self.folder.path(index), self.decoder)
            except UserError as error:
                return error
            except BrokenImageError as error:
                failure = error
            else:
                label, broken = int(self.folder.labels[index]), key[1] if attempt else -1
                return self.view(image, key), label, broken
        failure.can_be_skipped = self.seed is not None and not self.skip_broken  # in training
        return failure

    def view(self, image: Tensor | Image.Image, key: Key) -> Tensor:
        """Transforms a decoded image as its key says: uint8 (3, S, S)."""
        if self.seed is None:
            image = self.transform(image)
        else:
            # Not torch.manual_seed: that would also reseed the accelerators.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix_seed(self.seed, *key))
                image = self.transform(image)
        if not isinstance(image, Tensor):
            image = to_tensor(image)
        return image


@dataclass(frozen=True)
class Loader:
    """Describes how files become batches, the same in training and validation."""

    device: torch.device
    workers: int  # loader processes; 0 reads in this one
    timeout: float = 0  # seconds without a batch until workers count as hung; 0 waits for ever
    decoder: str = DECODERS[0]
    memory_format: torch.memory_format = torch.contiguous_format

    def batches(
        self,
        dataset: ImageDataset,
        keys: Sampler[list[Key]] | list[list[Key]],
        look: Preprocessing = USUAL,
    ) -> Callable[[], Iterator[Batch]]:
        """Returns a function that begins a pass over `dataset` in the order of `keys`.

        Batches are normalised as `look` says.
        """
        loader = self.open(dataset, keys, _collate)
        return partial(device_batches, loader, self.device, self.memory_format, look)

    def open(
        self,
        dataset: Dataset[Any],
        keys: Sampler[list[Key]] | list[list[Key]],
        collate: Callable[[list[Any]], Any],
    ) -> DataLoader[Any]:
        """Returns torch's loader; its workers stay alive from one pass to the next."""
        return DataLoader(
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


def check_readable(dataset: Any, context: Context) -> None:
    """Reads each image of a dataset once, each rank its share with several threads, and says so.

    Args:
        dataset: has a length; gives an image, or its fault as a value, by (0, index).

    Raises:
        UserError: exit code 1, an image cannot be read; names the file.
    """
    keys = [(0, index) for index in range(context.rank, len(dataset), context.world_size)]
    silent = not (context.is_main and sys.stderr.isatty())
    with ThreadPoolExecutor(processors()) as pool:
        items = pool.map(dataset.__getitem__, keys)
        for item in tqdm(items, "check val", len(keys), leave=False, disable=silent):
            if isinstance(item, BrokenImageError | UserError):
                pool.shutdown(wait=True, cancel_futures=True)
                raise as_raised(item)
    context.say(f"check: {len(dataset):,} validation images can be read")


def device_batches(
    loader: DataLoader[Any],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    look: Preprocessing = USUAL,
) -> Iterator[Batch]:
    """Iterates over `loader` with each batch on `device` and normalised.

    On CUDA the next batch is copied on a side stream while the present one is worked on.

    Args:
        loader: gives uint8 images (N, 3, S, S), targets (N,), and indices of broken images.
        look: has the mean and the standard deviation.

    Raises:
        UserError: a broken image (with its path), or a loader worker that hangs. (One that died is
            an exception that can arise anywhere, see `faults.of_outside`.)
    """
    scale = torch.tensor([1 / (255 * s) for s in look.std], device=device)
    pairs = zip(look.mean, look.std, strict=True)
    shift = torch.tensor([-m / s for m, s in pairs], device=device)

    def move(images: Tensor, targets: Tensor, broken: list[int]) -> Batch:
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        return Batch(_scaled(images, scale, shift, memory_format), targets, broken)

    if device.type != "cuda":
        for host in checked(loader):
            yield move(*host)
        return
    stream, ready = _side_stream(device), None
    for host in checked(loader):
        with torch.cuda.stream(stream):
            coming = move(*host)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in (coming.images, coming.targets):
            tensor.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready


@functools.cache  # the allocator keeps the freed memory of each stream apart
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _scaled(
    images: Tensor, scale: Tensor, shift: Tensor, memory_format: torch.memory_format
) -> Tensor:
    """Returns uint8 images (N, 3, H, W) · scale + shift, both (3,), as float32 in that format."""
    if memory_format != torch.channels_last:
        scale, shift = scale.view(3, 1, 1), shift.view(3, 1, 1)
        if images.device.type != "cpu":
            return images.to(torch.float32, memory_format=memory_format).mul_(scale).add_(shift)
        scaled = torch.empty(images.shape, dtype=torch.float32)
        for one, image in zip(scaled, images, strict=True):  # one by one they stay in the cache
            one.copy_(image).mul_(scale).add_(shift)
        return scaled
    # By whole rows of pixels: a loop over three numbers takes a CPU four times as long.
    rows = images.permute(0, 2, 3, 1).flatten(2).float()
    scale, shift = (t.repeat(images.shape[3]) for t in (scale, shift))
    rows.mul_(scale).add_(shift)
    return rows.view(*rows.shape[:2], -1, 3).permute(0, 3, 1, 2)


def _collate(items: list[Any]) -> Loaded | BrokenImageError | UserError:
    for item in items:
        if isinstance(item, BrokenImageError | UserError):
            return item
    images, labels, broken = zip(*items, strict=True)
    # Stacked as decoders leave them, channels innermost: turning them round takes a worker half as
    # long as the crop, and the device that gets them next to nothing.
    pixels = [image.permute(1, 2, 0) for image in images]
    turned = all(p.is_contiguous() for p in pixels)
    stacked = default_collate(pixels).permute(0, 3, 1, 2) if turned else default_collate([*images])
    return stacked, torch.tensor(labels), [i for i in broken if i >= 0]


def init_worker(_: int) -> None:
    """Prepares a loader worker, as `DataLoader(worker_init_fn=…)` asks."""
    die_with_parent()
    # Stop requests are for the main process, which finishes its step, saves and ends the workers.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    leave_broken_connections_unsaid()
    torch.set_num_threads(1)


def leave_broken_connections_unsaid() -> None:
    """Prints no traceback when the main process ends while it takes a batch from this worker.

    The thread that hands tensors over has no other place for it, and nobody is left to be told.
    """
    former = sys.excepthook

    def hook(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            former(kind, *rest)

    sys.excepthook = hook


def checked(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields the loader's batches, and turns faults of its workers into errors of one line.

    Raises:
        UserError: for a fault that came as a value, or where workers hang.
        RuntimeError: in torch's words, for a worker that died: see `faults.of_outside`.
    """
    batches = None
    try:
        if loader.num_workers:
            end_children_at_exit()
            _allow_files(FILES * (loader.num_workers + 1))
            BEGUN.add(loader)
        batches = iter(loader)  # which waits for the workers, too
        for batch in batches:
            if isinstance(batch, BrokenImageError | UserError):
                raise as_raised(batch)
            yield batch
    except Exception as error:
        text = str(error)
        hang = "DataLoader timed out" in text
        # Connections of a worker that is killed break before it counts as dead. What a worker
        # raised itself is marked as caught there.
        broken = isinstance(error, ConnectionError | EOFError) and not text.startswith("Caught ")
        died = "exited unexpectedly" in text or (broken and loader.num_workers)
        fault = _death(batches, error) if died else error
        _end_workers(loader, batches, hang)
        if hang:
            fault = UserError(
                f"no batch from the loader workers for {loader.timeout:g} s: they hang (slow or "
                "stuck storage?); raise --worker-timeout or use fewer workers (-j)",
                EXIT_FAILED,
            )
        raise fault from None


def end_workers() -> None:
    """Ends the workers of every loader: they stay alive between passes, and a run is over."""
    for loader in list(BEGUN):
        _end_workers(loader, loader._iterator)
        BEGUN.discard(loader)


def _end_workers(loader: DataLoader[Any], batches: Any, hang: bool = False) -> None:
    """Ends the workers of a pass that a fault has ended; a later pass starts others.

    Else they live as long as anything refers to the pass, such as the fault's own traceback. Those
    that `hang` wait for storage and do not hear of their end; torch would wait for each.
    """
    workers: list[multiprocessing.Process] = getattr(batches, "_workers", [])
    if not workers:
        return
    loader._iterator = None  # of persistent workers
    former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take this for a fault
    try:
        if hang:
            for worker in workers:
                worker.kill()
        if shut_down := getattr(batches, "_shutdown_workers", None):
            shut_down()
        for worker in workers:
            worker.kill()  # SIGTERM, which torch sends, is for the main process: they ignore it
        for worker in workers:
            wait([worker.sentinel], PATIENCE)
    finally:
        signal.signal(signal.SIGCHLD, former)


def _allow_files(number: int) -> None:
    """Raises the limit of open files where so many more would not be allowed."""
    needed = len(os.listdir("/dev/fd")) + number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _death(batches: Any, error: Exception) -> Exception:
    """Returns `error`, or an error that names the signal by which a worker died."""
    workers: list[multiprocessing.Process] = getattr(batches, "_workers", [])
    gone = wait([worker.sentinel for worker in workers], PATIENCE) if workers else []
    for worker in workers:
        if worker.sentinel in gone:
            worker.join(PATIENCE)  # this, too, breaks before it has an exit code
        if (code := worker.exitcode or 0) < 0:
            how = signal.strsignal(-code)
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: {how}.")
    return error


def as_raised(fault: BrokenImageError | UserError) -> UserError:
    """Returns the exception that ends the run for a fault that a worker returned as a value."""
    if isinstance(fault, UserError):
        return fault
    remedy = "mend or remove the file (python -m tools.check_images lists all broken ones)"
    if fault.can_be_skipped:
        remedy += ", or train with --skip-bad-images"
    return UserError(f"{fault}; {remedy}", EXIT_FAILED)

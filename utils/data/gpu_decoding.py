"""Decodes on the GPU (--decoder cuda): workers read files, the GPU decodes, crops, resizes, flips.

Bytes travel of plain JPEGs, which nvJPEG reads as libjpeg does but for its arithmetic. Anything
else, and what nvJPEG refuses after all, is decoded on the CPU as by "torchvision": nvJPEG says
neither which image of a batch it could not read nor why.
"""

import io
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from utils.data import decoding
from utils.data.decoding import ON_DEVICE, BrokenImageError
from utils.data.loader_workers import as_raised
from utils.data.loading import Batch, ImageDataset, Loaded, Reading
from utils.data.sampler import Key
from utils.system.errors import UserError
from utils.system.text import printable

ON_CPU = decoding.DECODERS[0]  # what takes the device's place
Item = tuple[torch.Tensor, int, int, Key]  # image, label, broken: see `ImageDataset`; key
Decode = Callable[[list[torch.Tensor], torch.device], list[torch.Tensor]]


def decode_jpegs(encoded: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Decodes JPEGs, each uint8 (n,) on the CPU, to uint8 (3, H, W) on `device`.

    Raises:
        RuntimeError: one of them cannot be decoded there.
    """
    if device.type == "cuda":
        # nvJPEG writes on a stream of torchvision's, which does not wait for the one whose memory
        # it writes to (pytorch/vision#9606): what still reads that memory has to come to its end.
        torch.cuda.current_stream(device).synchronize()
    try:
        return decoding.jpeg_decoder()(encoded, device=device)
    except RuntimeError:
        if device.type == "cuda":  # others of the batch may still be written, to memory now free
            torch.cuda.synchronize(device)
        raise


def check_decoder(decoder: str, device: torch.device, decode: Decode = decode_jpegs) -> None:
    """Refuses "cuda", before any other work, where it would not work.

    Raises:
        UserError: the run's device is no GPU of NVIDIA's, or torchvision has no nvJPEG for it.
    """
    if decoder != ON_DEVICE:
        return
    remedy = f"give another --decoder, such as {ON_CPU}"
    if device.type != "cuda":
        raise UserError(
            f"--decoder {ON_DEVICE} decodes on an NVIDIA GPU, and this run is on {device}: {remedy}"
        )
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    try:
        decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--decoder {ON_DEVICE}: torchvision does not decode on this GPU ({reason}): {remedy}"
        ) from None


class Packed(NamedTuple):
    """Holds a batch from a worker in one tensor, because each tensor costs an open file."""

    data: torch.Tensor  # uint8 (n,), the images' one after the other
    shapes: list[tuple[int, ...]]  # (n,): the bytes of a JPEG; (S, S, 3): pixels, transformed
    labels: torch.Tensor  # (N,) int64
    broken: list[int]  # (N,) indices of images that were replaced; -1 for the others
    keys: list[Key]

    def images(self) -> list[torch.Tensor]:
        """Each as the worker gave it: uint8 (n,) or (3, S, S)."""
        parts = self.data.split([math.prod(shape) for shape in self.shapes])
        images = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return [image if is_encoded(image) else image.permute(2, 0, 1) for image in images]


def is_encoded(image: torch.Tensor) -> bool:
    """Returns whether `read_image` gave a JPEG's bytes for the device to decode, not pixels."""
    return image.ndim == 1


class Unfinished(Dataset):
    """Gives the items of `images` without the work that the device does later.

    What a worker decodes it crops, too: whole photographs would fill the shared memory.
    """

    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Item | BrokenImageError | UserError:
        item = self.images.read(key, ON_DEVICE)
        if isinstance(item, Exception):
            return item
        image, label, broken = item
        if not is_encoded(image):
            image = self.images.view(image, key)
        return image, label, broken, key


def pack(items: list[Item | BrokenImageError | UserError]) -> Packed | BrokenImageError | UserError:
    """Packs a batch of the items of an `Unfinished`; returns the first fault if there is one."""
    for item in items:
        if isinstance(item, BrokenImageError | UserError):
            return item
    images, labels, broken, keys = zip(*items, strict=True)
    # With the channels innermost, as they lie in memory.
    images = [image if is_encoded(image) else image.permute(1, 2, 0) for image in images]
    shapes = [tuple(image.shape) for image in images]
    data = torch.cat([image.reshape(-1) for image in images])
    return Packed(data, shapes, torch.tensor(labels), list(broken), list(keys))


@dataclass
class Finish:
    """Decodes, crops, resizes and flips a `Packed` batch of `images`, see `device_batches`.

    An image's crop and flip are drawn on the CPU, by its key, whatever decodes it.

    Raises:
        UserError: an image that the CPU cannot read either, with its path.
        torch.OutOfMemoryError: a single image is too much for the device.
    """

    images: ImageDataset
    device: torch.device
    decode: Decode = decode_jpegs
    said: bool = False  # that the CPU steps in

    def __call__(self, batch: Packed) -> Loaded:
        images, labels, broken = batch.images(), batch.labels, list(batch.broken)
        encoded = [place for place, image in enumerate(images) if is_encoded(image)]
        for place, image in self._decoded(encoded, images):
            key = batch.keys[place]
            if image is None:
                item = self.images.read(key, ON_CPU)
                if isinstance(item, Exception):
                    raise as_raised(item)
                image, labels[place], broken[place] = item
                self._say(key)
            images[place] = self.images.view(image, key)
        stacked = torch.stack([image.to(self.device, non_blocking=True) for image in images])
        return stacked, labels, [index for index in broken if index >= 0]

    def _say(self, key: Key) -> None:
        if not self.said:
            self.said = True
            path = printable(self.images.folder.path(key[1]))
            tqdm.write(
                f"! {path}: the GPU does not decode it; the CPU reads such images, one at a time, "
                "in this process (said once)",
                file=sys.stderr,
            )

    def _decoded(
        self, places: list[int], images: list[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Yields each place in the batch with its image; None where the device cannot decode it.

        What fails together is done again by halves: one image spoils its batch, and photographs
        may be too large for the memory together.
        """
        if not places:
            return
        try:
            decoded = self.decode([images[place] for place in places], self.device)
        except torch.OutOfMemoryError:
            if len(places) == 1:  # the CPU's pixels would make the run another one
                raise
            decoded = None
        except RuntimeError:
            decoded = [None] if len(places) == 1 else None
        if decoded is not None:
            yield from zip(places, decoded, strict=True)
            return
        half = len(places) // 2
        yield from self._decoded(places[:half], images)
        yield from self._decoded(places[half:], images)


class DeviceReading(Reading):
    """Reads like `Reading`, but the device decodes."""

    def batches(
        self, dataset: ImageDataset, keys: Sampler[list[Key]]
    ) -> Callable[[], Iterator[Batch]]:
        """Works as `Reading.batches`; the dataset's own decoder is not used."""
        finish = Finish(dataset, self.device)
        return self._passes(Unfinished(dataset), keys, pack, finish)


def reading_of(decoder: str) -> type[Reading]:
    """Returns the class of reading that uses `decoder`: on the device or in the workers."""
    return DeviceReading if decoder == ON_DEVICE else Reading

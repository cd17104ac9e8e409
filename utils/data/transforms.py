"""Transforms images between decoding and the network, up to 8-bit pixels.

Training images go through torchvision.transforms.v2, and timm's RandAugment. Sizes and crops of
evaluated ones are torchvision's bit for bit without its import, which takes half as long as
torch's: whoever wants the class of one picture would wait for that longer than for the answer.
"""

import math
import platform
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from utils.data.decoding import to_tensor

Picture = torch.Tensor | Image.Image  # RGB; a tensor is uint8 (3, H, W)
Transform = Callable[[Picture], Picture]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")

# Photographic operations of one strength or another, as published for ImageNet: torchvision's by
# name, besides timm's RandAugment, whose name holds its magnitude and that one's deviation.
AUTO_AUGMENTS = {"none": None, "trivial": "TrivialAugmentWide", "rand": "RandAugment"}
TIMM_AUGMENT = re.compile(r"rand-m(\d+(?:\.\d+)?)-mstd(\d+(?:\.\d+)?)-inc1")
TIMM_EXAMPLE = "rand-m7-mstd0.5-inc1"
TOP = 10.0  # timm's largest magnitude


def is_timm_augment(text: str) -> bool:
    """Returns whether a name is that of timm's RandAugment, with a magnitude of at most 10."""
    match = TIMM_AUGMENT.fullmatch(text)
    return match is not None and float(match[1]) <= TOP


@dataclass(frozen=True)
class Preprocessing:
    """Describes how an image becomes what a network sees at evaluation.

    The shorter side becomes S / crop_pct, then the central S x S stays (0.875: 256 and 224). Pixels
    from 0 to 1 are normalised as (pixel - mean) / std, by channel.
    """

    img_size: int = 224  # S
    crop_pct: float = 0.875
    interpolation: str = INTERPOLATIONS[0]  # one of `INTERPOLATIONS`
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def resized(self) -> int:
        """Returns the pixels of the shorter side before the crop."""
        return round(self.img_size / self.crop_pct)

    def __call__(self, image: Picture) -> Picture:
        """Resizes and cuts an image; the pixels stay 8-bit."""
        height, width = size_of(image)
        longer = int(self.resized * max(height, width) / min(height, width))
        sides = (self.resized, longer) if height < width else (longer, self.resized)
        return center_crop(resize(image, sides, self.interpolation), self.img_size)


def size_of(image: Picture) -> tuple[int, int]:
    """Returns (height, width) of a picture."""
    if isinstance(image, torch.Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def resize(
    image: Picture, size: tuple[int, int], interpolation: str = INTERPOLATIONS[0]
) -> Picture:
    """Resizes with antialiased weights, as torchvision's `resize(antialias=True)`.

    Args:
        image: RGB; a tensor is uint8 (3, H, W), on any device.
        size: (height, width) to be.
    """
    if size_of(image) == size:
        return image
    if not isinstance(image, torch.Tensor):
        return image.resize(size[::-1], Image.Resampling[interpolation.upper()])
    one = _as_batch(image)
    in_8_bits = image.device.type == "cpu" and (interpolation == "bicubic" or _resizes_8_bits())
    one = one if in_8_bits else one.float()
    one = interpolate(one, size, mode=interpolation, align_corners=False, antialias=True)
    return one[0] if in_8_bits else one[0].clamp_(0, 255).round_().to(torch.uint8)


def center_crop(image: Picture, side: int) -> Picture:
    """Cuts out the central side x side, as torchvision's `center_crop`.

    What lies outside of a picture that is smaller becomes black.
    """
    height, width = size_of(image)
    spare_rows, spare_columns = max(side - height, 0), max(side - width, 0)
    # torchvision cuts after it has made a small picture large enough, so at 0.
    top = -(spare_rows // 2) if spare_rows else round((height - side) / 2)
    left = -(spare_columns // 2) if spare_columns else round((width - side) / 2)
    if not isinstance(image, torch.Tensor):
        return image.crop((left, top, left + side, top + side))
    if spare_rows or spare_columns:
        around = (-left, left + side - width, -top, top + side - height)
        return pad(image, around)  # negative on a side that is long enough: cut off
    return image[:, top : top + side, left : left + side]


def _as_batch(image: torch.Tensor) -> torch.Tensor:
    """Returns (3, H, W) as (1, 3, H, W).

    Where the pixels lie in channels-last order the strides say so without doubt: torch would take
    a batch of one for the other order, and copy it.
    """
    channels, height, width = image.shape
    strides = image.stride()
    return image.as_strided((1, channels, height, width), (image.numel(), *strides))


def _resizes_8_bits() -> bool:
    """Returns whether torchvision resizes uint8 bilinearly as it is on this CPU, not in float32."""
    quick = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return quick or platform.machine() in ("aarch64", "arm64")


class TimmRandAugment:
    """Applies timm's RandAugment; its chance is torch's default generator's.

    timm draws from the generators of Python and numpy, which are seeded for each image and put
    back behind it, so that an image depends on its own seed alone.
    """

    def __init__(self, name: str, colour: Sequence[int]):
        from timm.data.auto_augment import rand_augment_transform  # slow to import, and optional

        # A magnitude of 10 would keep no bit of a posterized image, which Pillow refuses since 12.
        limits = {"img_mean": tuple(colour), "magnitude_max": math.nextafter(TOP, 0)}
        self.augment = rand_augment_transform(name, limits)

    def __call__(self, image: Picture) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
        seed = int(torch.randint(2**32, ()).item())
        former = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that timm uses
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            return to_tensor(self.augment(image))
        finally:
            random.setstate(former[0])
            np.random.set_state(former[1])  # noqa: NPY002


def train_transform(
    img_size: int,
    min_scale: float,
    hflip: float,
    auto_augment: str = "none",
    random_erasing: float = 0.0,
    vflip: float = 0.0,
    colour: float = 0.0,
    interpolation: str = INTERPOLATIONS[0],
    mean: Sequence[float] = IMAGENET_MEAN,
) -> Transform:
    """Makes what a training image goes through; the chance is torch's default generator's.

    Args:
        img_size: S; a random crop is resized to S x S.
        min_scale: the smallest crop's share of the area; the largest is all of it.
        hflip, vflip: probabilities of an image mirrored left to right, and upside down.
        auto_augment: a key of `AUTO_AUGMENTS`, for torchvision's defaults; or timm's RandAugment.
        random_erasing: probability that a rectangle takes the mean colour, which is what
            torchvision's 0 after the normalisation is.
        colour: c of torchvision's ColorJitter: brightness, contrast and saturation are each
            multiplied by a number from 1 - c (at least 0) to 1 + c.
        mean: of each channel, from 0 to 1.
    """
    from torchvision.transforms import v2  # slow to import

    mode, mean_colour = v2.InterpolationMode(interpolation), [round(255 * value) for value in mean]
    steps: list[Callable[[Any], Any]] = [
        v2.RandomResizedCrop(img_size, (min_scale, 1.0), interpolation=mode, antialias=True),
        v2.RandomHorizontalFlip(hflip),
    ]
    if vflip:  # what is off draws no number: seeded runs of before it existed stay themselves
        steps.append(v2.RandomVerticalFlip(vflip))
    if colour:
        steps.append(v2.ColorJitter(colour, colour, colour))
    if is_timm_augment(auto_augment):
        steps.append(TimmRandAugment(auto_augment, mean_colour))
    elif (augment := AUTO_AUGMENTS[auto_augment]) is not None:
        steps.append(getattr(v2, augment)(interpolation=mode))
    if random_erasing:
        steps += [v2.PILToTensor(), v2.RandomErasing(random_erasing, value=mean_colour)]
    transform: Transform = v2.Compose(steps)
    return transform

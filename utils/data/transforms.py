"""Transforms images between decoding and the network, up to 8-bit pixels.

Training images go through torchvision.transforms.v2, and timm's RandAugment. Sizes and crops of
evaluated ones are torchvision's bit for bit without its import, which takes half as long as
torch's: whoever wants the class of one picture would wait for that longer than for the answer.
"""

import math
import platform
import random
import re
from collections.abc import Callable
from functools import partial
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
MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)

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


def size_of(image: Picture) -> tuple[int, int]:
    """Returns (height, width) of a picture."""
    if isinstance(image, torch.Tensor):
        return tuple(image.shape[-2:])
    return image.height, image.width


def resize(image: Picture, size: tuple[int, int]) -> Picture:
    """Resizes with antialiased bilinear weights, as torchvision's `resize(antialias=True)`.

    Args:
        image: RGB; a tensor is uint8 (3, H, W), on any device.
        size: (height, width) to be.
    """
    if size_of(image) == size:
        return image
    if not isinstance(image, torch.Tensor):
        return image.resize(size[::-1], Image.Resampling.BILINEAR)
    one = _as_batch(image)
    in_8_bits = image.device.type == "cpu" and _resizes_8_bits()
    one = one if in_8_bits else one.float()
    one = interpolate(one, size, mode="bilinear", align_corners=False, antialias=True)
    return one[0] if in_8_bits else one[0].round_().to(torch.uint8)


def center_crop(image: Picture, side: int) -> Picture:
    """Cuts out the central side x side, as torchvision's `center_crop`.

    What lies outside of a picture that is smaller becomes black.

    Args:
        image: as for `resize`.
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
    """Returns whether torchvision resizes uint8 as it is on this CPU, and not in float32."""
    quick = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return quick or platform.machine() in ("aarch64", "arm64")


class TimmRandAugment:
    """Applies timm's RandAugment; its chance is torch's default generator's.

    timm draws from the generators of Python and numpy, which are seeded for each image and put
    back behind it, so that an image depends on its own seed alone.
    """

    def __init__(self, name: str):
        from timm.data.auto_augment import rand_augment_transform  # slow to import, and optional

        # A magnitude of 10 would keep no bit of a posterized image, which Pillow refuses since 12.
        limits = {"img_mean": MEAN_COLOUR, "magnitude_max": math.nextafter(TOP, 0)}
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
) -> Transform:
    """Makes what a training image goes through.

    Args:
        img_size: S; a random crop is resized to S x S.
        min_scale: the smallest crop's share of the area; the largest is all of it.
        hflip: probability of a mirrored image.
        auto_augment: a key of `AUTO_AUGMENTS`, for torchvision's defaults; or timm's RandAugment.
        random_erasing: probability that a rectangle takes the mean colour, which is what
            torchvision's 0 after the normalisation is.
    """
    v2 = transforms_v2()
    steps: list[Callable[[Any], Any]] = [
        v2.RandomResizedCrop(img_size, scale=(min_scale, 1.0), antialias=True),
        v2.RandomHorizontalFlip(hflip),
    ]
    if is_timm_augment(auto_augment):
        steps.append(TimmRandAugment(auto_augment))
    elif (augment := AUTO_AUGMENTS[auto_augment]) is not None:
        steps.append(getattr(v2, augment)(interpolation=v2.InterpolationMode.BILINEAR))
    if random_erasing:
        steps += [v2.PILToTensor(), v2.RandomErasing(random_erasing, value=list(MEAN_COLOUR))]
    return v2.Compose(steps)


def transforms_v2() -> Any:
    """Returns torchvision.transforms.v2, imported when used."""
    from torchvision.transforms import v2

    return v2


def eval_transform(img_size: int, crop_pct: float) -> Transform:
    """Makes what an evaluated image goes through.

    The shorter side becomes S / crop_pct, then the central S x S stays (0.875: 256 and 224).
    """
    return partial(shorter_side_and_crop, size=round(img_size / crop_pct), crop=img_size)


def shorter_side_and_crop(image: Picture, size: int, crop: int) -> Picture:
    """Resizes the shorter side to `size` pixels, then cuts out the central crop x crop."""
    height, width = size_of(image)
    longer = int(size * max(height, width) / min(height, width))
    return center_crop(resize(image, (size, longer) if height < width else (longer, size)), crop)

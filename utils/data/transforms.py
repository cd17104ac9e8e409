"""Transforms images between decoding and the network, up to 8-bit pixels."""

from collections.abc import Callable
from typing import Any

import torch

from utils.data.long_images import is_long, resized_center_crop
from utils.data.rand_augment import NoisyRandAugment, parse_rand_augment
from utils.data.resizing import Picture, center_crop, resize, size_of

Transform = Callable[[Picture], Picture]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CropResized:
    """torchvision's RandomResizedCrop, with its quick road for uint8: the crop in channels_last.

    The pixels are the same; a 500 x 375 photo's crop takes two thirds of the time.

    Args:
        size: S; the crop is resized to S x S.
        min_scale: the smallest crop's share of the area; the largest is all of it.
    """

    def __init__(self, size: int, min_scale: float):
        self.whole = transforms_v2().RandomResizedCrop(size, scale=(min_scale, 1.0), antialias=True)

    def __call__(self, image: Picture) -> Picture:
        if not isinstance(image, torch.Tensor):
            return self.whole(image)
        functional = transforms_v2().functional
        box = self.whole.make_params([image])
        crop = functional.crop(image, *(box[k] for k in ("top", "left", "height", "width")))
        crop = crop[None].contiguous(memory_format=torch.channels_last)
        size, interpolation = self.whole.size, self.whole.interpolation
        return functional.resize(crop, size, interpolation, antialias=True)[0]


# Photographic operations of one strength or another, as published for ImageNet; besides timm's
# RandAugment, whose name holds its magnitude, see `utils.data.rand_augment`.
AUTO_AUGMENTS = {"none": None, "trivial": "TrivialAugmentWide", "rand": "RandAugment"}


def transforms_v2() -> Any:
    """Returns torchvision.transforms.v2, imported when used: it takes half as long as torch."""
    from torchvision.transforms import v2

    return v2


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
    steps = [CropResized(img_size, min_scale), v2.RandomHorizontalFlip(hflip)]
    if (noisy := parse_rand_augment(auto_augment)) is not None:
        steps += [v2.PILToTensor(), NoisyRandAugment(*noisy)]
    elif (augment := AUTO_AUGMENTS[auto_augment]) is not None:
        steps.append(getattr(v2, augment)(interpolation=v2.InterpolationMode.BILINEAR))
    if random_erasing:
        mean = [round(255 * m) for m in IMAGENET_MEAN]
        steps += [v2.PILToTensor(), v2.RandomErasing(random_erasing, value=mean)]
    return v2.Compose(steps)


class ShorterSideAndCrop:
    """Resizes the shorter side, then keeps the central square.

    Args:
        size: of the shorter side, pixels.
        crop: C; the central C x C stays.
    """

    def __init__(self, size: int, crop: int):
        self.size, self.crop = size, crop

    def __call__(self, image: Picture) -> Picture:
        height, width = size_of(image)
        longer = int(self.size * max(height, width) / min(height, width))
        resized = (self.size, longer) if height < width else (longer, self.size)
        if not is_long(height, width) or self.size < self.crop:
            return center_crop(resize(image, resized), self.crop)
        if not isinstance(image, torch.Tensor):
            return resized_center_crop(image, resized, self.crop)
        return resized_center_crop(image.cpu(), resized, self.crop).to(image.device)


def eval_transform(img_size: int, crop_pct: float) -> Transform:
    """Makes what an evaluated image goes through.

    The shorter side becomes S / crop_pct, then the central S x S stays (0.875: 256 and 224).
    """
    return ShorterSideAndCrop(round(img_size / crop_pct), img_size)

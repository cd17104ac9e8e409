"""Transforms images between decoding and the network, up to 8-bit pixels."""

from functools import partial

import torch
from PIL import Image
from torchvision.transforms import v2

from utils.data.long_images import is_long, resized_center_crop

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CropResized(v2.RandomResizedCrop):
    """Crops and resizes as RandomResizedCrop, but quicker: `resize` gets uint8 channels_last.

    The pixels are the same; a 500 x 375 photo's crop takes two thirds of the time.
    """

    def transform(self, image: torch.Tensor | Image.Image, params: dict[str, int]):
        if not isinstance(image, torch.Tensor):
            return super().transform(image, params)
        box = (params[k] for k in ("top", "left", "height", "width"))
        crop = v2.functional.crop(image, *box)[None].contiguous(memory_format=torch.channels_last)
        return v2.functional.resize(crop, self.size, self.interpolation, antialias=True)[0]


# Photographic operations of one strength or another, as published for ImageNet.
AUTO_AUGMENTS = {
    "none": None,
    "trivial": partial(v2.TrivialAugmentWide, interpolation=v2.InterpolationMode.BILINEAR),
    "rand": partial(v2.RandAugment, interpolation=v2.InterpolationMode.BILINEAR),
}


def train_transform(
    img_size: int,
    min_scale: float,
    hflip: float,
    auto_augment: str = "none",
    random_erasing: float = 0.0,
) -> v2.Compose:
    """Returns the transform of training images.

    Args:
        img_size: S; a random crop is resized to S x S.
        min_scale: the smallest crop's share of the area; the largest is all of it.
        hflip: probability of a mirrored image.
        auto_augment: a key of `AUTO_AUGMENTS`; torchvision's defaults.
        random_erasing: probability that a rectangle takes the mean colour, which is what
            torchvision's 0 after the normalisation is.
    """
    steps = [
        CropResized(img_size, scale=(min_scale, 1.0), antialias=True),
        v2.RandomHorizontalFlip(hflip),
    ]
    if (augment := AUTO_AUGMENTS[auto_augment]) is not None:
        steps.append(augment())
    if random_erasing:
        mean = [round(255 * m) for m in IMAGENET_MEAN]
        steps += [v2.PILToTensor(), v2.RandomErasing(random_erasing, value=mean)]
    return v2.Compose(steps)


class ShorterSide(v2.Resize):
    """Resizes the shorter side to `size`; of a long image only the part that the crop uses.

    Args:
        size: of the shorter side, pixels.
        crop: C; what follows keeps the central C x C.
    """

    def __init__(self, size: int, crop: int):
        super().__init__(size, antialias=True)
        self.crop = crop

    def transform(self, image: torch.Tensor | Image.Image, params: dict):
        height, width = v2.functional.get_size(image)
        (size,) = self.size
        if not is_long(height, width) or size < self.crop:
            return super().transform(image, params)
        longer = int(size * max(height, width) / min(height, width))
        resized = (size, longer) if height < width else (longer, size)
        if not isinstance(image, torch.Tensor):
            return resized_center_crop(image, resized, self.crop)
        return resized_center_crop(image.cpu(), resized, self.crop).to(image.device)


def eval_transform(img_size: int, crop_pct: float) -> v2.Compose:
    """Returns the transform of evaluation: shorter side to S / crop_pct, then the central S x S
    (0.875: 256 and 224).
    """
    return v2.Compose([ShorterSide(round(img_size / crop_pct), img_size), v2.CenterCrop(img_size)])

"""Resizes and crops for evaluation: the pixels of torchvision.transforms.v2, without its import.

Importing torchvision takes half as long as importing torch. Whoever asks for the class of one
picture would wait for that longer than for the answer.
"""

import platform

import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

Picture = torch.Tensor | Image.Image


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

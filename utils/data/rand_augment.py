"""timm's RandAugment with noise in its magnitude (rand-m7-mstd0.5-inc1), on tensors.

Operations and levels are those of timm's "increasing" set: Cubuk et al. 2020, with each operation
left out by even chance, and its magnitude drawn anew from a normal distribution.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

Operation = Callable[[torch.Tensor, float], torch.Tensor]
FORM = re.compile(r"rand-m(\d+(?:\.\d+)?)-mstd(\d+(?:\.\d+)?)-inc1")
EXAMPLE = "rand-m7-mstd0.5-inc1"
LAYERS = 2  # operations an image
PROBABILITY = 0.5  # of each of them
TOP = 10.0  # the largest magnitude
FILL = [124, 116, 104]  # of pixels from outside the image: ImageNet's mean colour


def parse_rand_augment(text: str) -> tuple[float, float] | None:
    """Returns magnitude, from 0 to 10, and its standard deviation; None for another text."""
    found = FORM.fullmatch(text)
    if found is None or float(found[1]) > TOP:
        return None
    return float(found[1]), float(found[2])


class NoisyRandAugment:
    """Applies two operations, each by even chance; the chance is torch's default generator's.

    Args:
        magnitude: mean of the operations' magnitudes, from 0 to 10.
        deviation: their standard deviation; what is drawn is kept from 0 to 10.
    """

    def __init__(self, magnitude: float, deviation: float):
        self.magnitude, self.deviation = magnitude, deviation

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Changes an image, uint8 (3, H, W)."""
        for number in torch.randint(len(OPERATIONS), (LAYERS,)).tolist():
            applied, noise, sign = torch.rand(()).item(), torch.randn(()).item(), torch.rand(())
            if applied < PROBABILITY:
                level = min(TOP, max(0.0, self.magnitude + self.deviation * noise)) / TOP
                operation = OPERATIONS[NAMES[number]]
                image = operation(image, -level if sign.item() < 0.5 else level)
        return image


def _functional() -> Any:
    from torchvision.transforms.v2 import functional  # slow to import

    return functional


def _plain(name: str, image: torch.Tensor, level: float) -> torch.Tensor:
    return getattr(_functional(), name)(image)


def _enhanced(name: str, image: torch.Tensor, level: float) -> torch.Tensor:
    return getattr(_functional(), name)(image, max(0.1, 1 + 0.9 * level))


def _posterize(image: torch.Tensor, level: float) -> torch.Tensor:
    return _functional().posterize(image, 4 - int(4 * abs(level)))


def _solarize(image: torch.Tensor, level: float) -> torch.Tensor:
    threshold = 256 - min(256, int(256 * abs(level)))
    return image if threshold > 255 else _functional().solarize(image, threshold)


def _solarize_add(image: torch.Tensor, level: float) -> torch.Tensor:
    brighter = image + min(128, int(110 * abs(level)))  # at most 255: below 128 before
    return torch.where(image < 128, brighter, image)


def _rotate(image: torch.Tensor, level: float) -> torch.Tensor:
    return _functional().rotate(image, 30 * level, _bilinear(), fill=FILL)


def _shear(axis: int, image: torch.Tensor, level: float) -> torch.Tensor:
    """Shears about the upper left corner, as Pillow does."""
    shear = [0.0, 0.0]
    shear[axis] = math.degrees(math.atan(0.3 * level))
    return _affine(image, shear=shear, center=[0, 0])


def _translate(axis: int, image: torch.Tensor, level: float) -> torch.Tensor:
    move = [0.0, 0.0]
    move[axis] = 0.45 * level * image.shape[2 - axis]
    return _affine(image, translate=move)


def _affine(image: torch.Tensor, **changed: Any) -> torch.Tensor:
    values: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    values |= changed
    return _functional().affine(image, **values, interpolation=_bilinear(), fill=FILL)


def _bilinear() -> Any:
    from torchvision.transforms.v2 import InterpolationMode

    return InterpolationMode.BILINEAR


# Level: magnitude / 10, with a sign by even chance, which the operations that have none leave out.
OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "AutoContrast": partial(_plain, "autocontrast"),
        "Equalize": partial(_plain, "equalize"),
        "Invert": partial(_plain, "invert"),
        "Rotate": _rotate,
        "PosterizeIncreasing": _posterize,
        "SolarizeIncreasing": _solarize,
        "SolarizeAdd": _solarize_add,
        "ColorIncreasing": partial(_enhanced, "adjust_saturation"),
        "ContrastIncreasing": partial(_enhanced, "adjust_contrast"),
        "BrightnessIncreasing": partial(_enhanced, "adjust_brightness"),
        "SharpnessIncreasing": partial(_enhanced, "adjust_sharpness"),
        "ShearX": partial(_shear, 0),
        "ShearY": partial(_shear, 1),
        "TranslateXRel": partial(_translate, 0),
        "TranslateYRel": partial(_translate, 1),
    }
)
NAMES = tuple(OPERATIONS)

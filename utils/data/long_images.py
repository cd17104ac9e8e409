"""Computes the central crop of a resized image, for images many times longer than they are wide.

An image of 20,000 × 1 pixels whose shorter side becomes 256 is 5 million pixels long, of which the
crop keeps 224. Here only those are computed, with the pixels that the whole would have had.
"""

import numpy as np
import torch
from PIL import Image

MAX_RATIO = 16  # of the sides; a longer image is not resized as a whole
PIL_BITS = 22  # of the fraction of Pillow's weights; torch finds its own
CHUNK = 4096  # pixels whose weights are looked at together


def is_long(height: int, width: int) -> bool:
    return max(height, width) > MAX_RATIO * min(height, width)


def resized_center_crop(
    image: torch.Tensor | Image.Image, resized: tuple[int, int], crop: int
) -> torch.Tensor | Image.Image:
    """Computes the central (crop, crop) of the image resized to `resized`, and nothing else.

    As `resize` with antialiased bilinear weights and `center_crop` of torchvision, for uint8 on
    the CPU: along the width first, then along the height, each rounded to 8 bits. The weights are
    Pillow's for a PIL image, and for a tensor those of 16 bits that torch uses there. (Where Pillow
    shrinks an image it may take the height first, which makes some pixels differ by 1.)

    Args:
        image: RGB; a tensor is uint8 (3, H, W).
        resized: (height, width), neither below `crop`.

    Returns:
        As `image`, of crop × crop pixels.
    """
    is_tensor = isinstance(image, torch.Tensor)
    pixels = image.numpy() if is_tensor else np.asarray(image).transpose(2, 0, 1)
    bits = None if is_tensor else PIL_BITS
    taps = []
    for old, new in zip(pixels.shape[1:], resized, strict=True):
        begin = round((new - crop) / 2)  # as torchvision places a central crop
        taps.append(_taps(old, new, begin, begin + crop, bits))
    rows = taps[0][0]
    first, last = rows.min(), rows.max() + 1
    pixels = _weighted(pixels[:, first:last], *taps[1])
    pixels = _weighted(pixels.transpose(0, 2, 1), rows - first, *taps[0][1:]).transpose(0, 2, 1)
    if is_tensor:
        return torch.from_numpy(np.ascontiguousarray(pixels))
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _taps(
    old: int, new: int, begin: int, end: int, bits: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns which old pixels, with which weights, make the pixels `begin` to `end` of a resized
    side.

    Returns:
        Indices (n, k) into the old side, whole-number weights (n, k), and their fraction's bits.
    """
    indices, weights = _shares(old, new, begin, end)
    if bits is None:
        bits = _torch_bits(old, new)
    whole = (0.5 + weights * (1 << bits)).astype(np.int32)
    return np.minimum(indices, old - 1), whole, bits


def _shares(old: int, new: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    scale = old / new
    support = max(scale, 1.0)  # of the triangle; wider when shrinking, against aliasing
    centre = scale * (np.arange(begin, end) + 0.5)
    lowest = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    highest = np.minimum((centre + support + 0.5).astype(np.int64), old)
    indices = lowest[:, None] + np.arange((highest - lowest).max())
    weights = 1 - np.abs((indices - centre[:, None] + 0.5) * (1 / support))
    weights = np.where(indices < highest[:, None], weights.clip(0), 0)
    return indices, weights * (1 / weights.sum(1, keepdims=True))


def _torch_bits(old: int, new: int) -> int:
    """Returns the most bits that keep the largest weight of the whole side below 2^15."""
    largest = 1.0  # when enlarging: that of the first pixel, which lies beyond the old one's centre
    if old > new:
        parts = range(0, new, CHUNK)
        largest = max(_shares(old, new, i, min(i + CHUNK, new))[1].max() for i in parts)
    bits = 0
    while bits < PIL_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits


def _weighted(pixels: np.ndarray, indices: np.ndarray, weights: np.ndarray, bits: int):
    """Turns (3, H, old) uint8 into (3, H, n): each pixel is a sum of `weights` times old pixels."""
    total = np.full((*pixels.shape[:2], len(indices)), 1 << (bits - 1), dtype=np.int32)
    for tap in range(indices.shape[1]):
        total += pixels[:, :, indices[:, tap]].astype(np.int32) * weights[:, tap]
    return (total >> bits).clip(0, 255).astype(np.uint8)

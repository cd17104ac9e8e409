"""Reads masks in COCO's encodings: polygons, run lengths as a list, run lengths as text.

faster-coco-eval's routines where installed, else pycocotools'; both give the same bytes.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.detection.coco_files import NUMBERS, is_finite
from utils.system.errors import UserError

FARTHEST = 1e6  # pixels from the corner of the image that a polygon may reach
LONGEST = 1e6  # pixels of outline that an object may have: the rasteriser takes 100 bytes for each
MARGIN = 100  # of the image's sides, which an outline may be longer than around its pixels
DIGITS = 12  # characters that a run length may have in COCO's text: 60 bits
PARTS = 64  # polygons that are merged at a time: one by one each would cost all before it

try:
    from faster_coco_eval import mask as api
except ImportError:
    try:
        from pycocotools import mask as api
    except ImportError:
        api = None


def _api() -> Any:
    if api is None:
        raise UserError(
            "COCO's masks need faster-coco-eval or pycocotools: pip install -r requirements.txt"
        )
    return api


def as_masks(segmentation: Any) -> Any:
    """Returns a segmentation from JSON in one of COCO's forms, also where a tool wrote a variant.

    A list of one run-length code becomes that code, a flat list of numbers one polygon, and whole
    numbers written as floats (1.0) become integers in run lengths. Anything else stays as it is.
    """
    if isinstance(segmentation, list) and segmentation:
        if all(map(is_finite, segmentation)):
            return [segmentation]
        if len(segmentation) == 1 and isinstance(segmentation[0], dict):
            segmentation = segmentation[0]
    if isinstance(segmentation, dict):
        whole = {key: _as_integers(segmentation.get(key)) for key in ("size", "counts")}
        return {**segmentation, **whole}
    return segmentation


def _as_integers(values: Any) -> Any:
    if not isinstance(values, list):
        return values
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def usable_polygons(segmentation: Any, height: int, width: int) -> list[list[float]]:
    """Returns the parts of a COCO segmentation that are polygons: 3 or more corners, some area.

    None at all where their outlines are together longer than those of any mask of this size: the
    rasteriser takes time and memory for each pixel of an outline, also far outside the image.
    """
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        return []
    outlines = [(part, _outline(part)) for part in segmentation]
    longest = min(LONGEST, 2 * height * width + MARGIN * (height + width))
    if sum(length for _, length in outlines) > longest:
        return []
    return [part for part, length in outlines if length]


def _outline(part: Any) -> float:
    """Returns the length of a polygon's outline in pixels; 0 for no polygon or no area."""
    if not isinstance(part, Sequence) or len(part) < 6 or len(part) % 2:
        return 0.0
    if not all(type(v) in NUMBERS and -FARTHEST <= v <= FARTHEST for v in part):
        return 0.0
    size, length = _area_and_length(part)
    return length if size > 5e-7 else 0.0


def _area_and_length(polygon: Sequence[float]) -> tuple[float, float]:
    """Returns a polygon's area and the length of its outline, in pixels."""
    x, y = polygon[::2], polygon[1::2]
    # COCO has a million of a few corners each, for which numpy's calls would take most of the time.
    across = list(map(operator.sub, [*x[1:], x[0]], x))
    down = list(map(operator.sub, [*y[1:], y[0]], y))
    twice = sum(map(operator.mul, x, down)) - sum(map(operator.mul, y, across))
    return abs(twice) / 2, sum(map(math.hypot, across, down))


def covers_a_pixel(polygons: Sequence[Sequence[float]], height: int, width: int) -> bool:
    """Returns whether the mask of polygons, from `usable_polygons`, has a pixel.

    Drawing all of COCO's would take minutes. A polygon that does not cross itself holds a circle of
    radius area / outline (Bonnesen's inequality), and one of radius 1 holds a pixel's centre; so
    only what is tiny or thin, or reaches outside the image, is drawn.
    """
    for polygon in polygons:
        size, length = _area_and_length(polygon)
        x, y = polygon[::2], polygon[1::2]
        inside = min(x) >= 0 and min(y) >= 0 and max(x) <= width and max(y) <= height
        if inside and size > length:
            return True
    return area(_draw(polygons, height, width)) > 0


def _draw(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    parts = _api().frPyObjects(polygons, height, width)
    while len(parts) > 1:
        parts = [_api().merge(parts[i : i + PARTS]) for i in range(0, len(parts), PARTS)]
    return parts[0]


def of_box(box: Sequence[float], height: int, width: int) -> dict[str, Any] | None:
    """Returns run lengths of the part of [x, y, w, h] in the image; None where there is none."""
    x, y, w, h = box
    x1, x2 = max(x, 0), min(x + w, width)
    y1, y2 = max(y, 0), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return None
    return _draw([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Returns run lengths of any COCO segmentation; None where it holds no mask of this size.

    Returns:
        {"size": [height, width], "counts": bytes}, as the mask routines take it.
    """
    segmentation = as_masks(segmentation)
    if not isinstance(segmentation, dict):
        polygons = usable_polygons(segmentation, height, width)
        return _draw(polygons, height, width) if polygons else None
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        return None
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    runs = _runs(counts) if isinstance(counts, bytes) else counts
    if not isinstance(runs, list) or not all(type(n) is int and n >= 0 for n in runs):
        return None
    if sum(runs) != height * width:  # pycocotools would read memory that is not its own
        return None
    if isinstance(counts, bytes):
        return {"size": [height, width], "counts": counts}
    return _api().frPyObjects({"size": size, "counts": counts}, height, width)


def _runs(text: bytes) -> list[int] | None:
    """Returns the run lengths that COCO's text stands for; None if it is no such text.

    Six bits a character: five of the number, lowest first, and whether more follow; signed, and
    from the fourth run on less the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64 or shift >= 5 * DIGITS:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Returns a mask as (H, W) uint8 of 0 and 1."""
    return _api().decode(rle)


def area(rle: dict[str, Any]) -> int:
    return int(_api().area(rle))


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Returns run lengths as text, fit for JSON, of (N, H, W) masks of 0 and 1."""
    if len(masks) == 0:
        return []
    stacked = np.asfortranarray(np.moveaxis(masks, 0, 2).astype(np.uint8))
    return [
        {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}
        for rle in _api().encode(stacked)
    ]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Returns uncompressed run lengths of one (H, W) mask: zeros first, column by column."""
    flat = np.asarray(mask, dtype=bool).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0] if not flat[:1].any() else [0, 0], edges, [flat.size]])
    return np.diff(bounds).tolist()

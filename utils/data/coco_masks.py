"""Reads masks in COCO's encodings: polygons, run lengths as a list, run lengths as text.

The routines are faster-coco-eval's, which give pycocotools' bytes.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.system.errors import UserError

NUMBERS = (int, float)  # as JSON gives them; by type() no bool is one
LARGEST = sys.float_info.max
FARTHEST = 1e6  # pixels from the corner of the image that a polygon may reach
DIGITS = 12  # characters that a run length may have in COCO's text: 60 bits
NO_POLYGON = "mask is no polygon"
NO_RUNS = "mask is no run-length code of the image's size"
BARE_RUNS = "mask is a plain list of run lengths, without their size"
NO_PIXEL = "mask without a pixel"
ELSEWHERE = "mask lies elsewhere than its box"

Rle = dict[str, Any]  # run lengths: "size" [height, width] and "counts", bytes as the routines take

try:
    from faster_coco_eval import mask as api
except ImportError:
    api = None


def _api() -> Any:
    if api is None:
        raise UserError("COCO's masks need faster-coco-eval: pip install -r requirements.txt")
    return api


def is_finite(value: Any) -> bool:
    """Returns whether a JSON value is a number that a float can hold: not text, NaN or infinite."""
    # A comparison takes integers of any size, which float() does not.
    return type(value) in NUMBERS and -LARGEST <= value <= LARGEST


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
        return {key: _as_integers(segmentation.get(key)) for key in ("size", "counts")}
    return segmentation


def _as_integers(values: Any) -> Any:
    if not isinstance(values, list):
        return values
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def are_bare_runs(segmentation: Any, height: int, width: int) -> bool:
    """Returns whether a segmentation is a plain list of run lengths of an image of this size.

    Without their size they look like a polygon's corners, and would be drawn as one.
    """
    if not isinstance(segmentation, list) or not all(map(is_finite, segmentation)):
        return False
    runs = _as_integers(segmentation)
    return all(type(n) is int and n >= 0 for n in runs) and sum(runs) == height * width


def mask_fault(
    segmentation: Any, height: int, width: int, box: Sequence[float] | None = None
) -> str | None:
    """Returns why an object's segmentation is no mask with a pixel, or None if it is one.

    Args:
        box: of the object, as x1, y1, x2, y2 inside the image; the mask must lie where it is.
    """
    if are_bare_runs(segmentation, height, width):
        return BARE_RUNS
    rle = to_rle(segmentation, height, width)
    if rle is None:
        return NO_RUNS if isinstance(as_masks(segmentation), dict) else NO_POLYGON
    if not area(rle):
        return NO_PIXEL
    return ELSEWHERE if box is not None and are_apart(bounds(rle), box) else None


def are_apart(mask: Sequence[float], box: Sequence[float]) -> bool:
    """Returns whether a mask's rectangle and a box, both x1, y1, x2, y2, lie apart.

    They do where less than half of the smaller one lies in the other: a mask may be a part of its
    box, or reach out of it.
    """
    x1, y1, x2, y2 = map(float, box)
    across = max(0.0, min(x2, mask[2]) - max(x1, mask[0]))
    down = max(0.0, min(y2, mask[3]) - max(y1, mask[1]))
    smaller = min((x2 - x1) * (y2 - y1), (mask[2] - mask[0]) * (mask[3] - mask[1]))
    return across * down < smaller / 2


def bounds(rle: Rle) -> tuple[float, float, float, float]:
    """Returns the rectangle around a mask's pixels, as x1, y1, x2, y2."""
    x, y, w, h = map(float, _api().toBbox(rle))
    return x, y, x + w, y + h


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    if not set(map(type, part)) <= {*NUMBERS}:
        return False
    # min and max pass over a NaN that does not come first, the sum does not
    return min(part) >= -FARTHEST and max(part) <= FARTHEST and sum(part) == sum(part)


def _draw(polygons: Sequence[Sequence[float]], height: int, width: int) -> Rle:
    rle: Rle = _api().merge(_api().frPyObjects(polygons, height, width))
    return rle


def of_box(box: Sequence[float], height: int, width: int) -> Rle | None:
    """Returns run lengths of the part of [x, y, w, h] in the image; None where there is none."""
    x, y, w, h = box
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return None
    return _draw([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)


def to_rle(segmentation: Any, height: int, width: int) -> Rle | None:
    """Returns run lengths of any COCO segmentation; None where it holds no mask of this size.

    Returns:
        {"size": [height, width], "counts": bytes}, as the mask routines take it.
    """
    if are_bare_runs(segmentation, height, width):
        return None
    segmentation = as_masks(segmentation)
    if not isinstance(segmentation, dict):
        parts = segmentation if isinstance(segmentation, list) else ()
        polygons = [part for part in parts if _is_polygon(part)]
        return _draw(polygons, height, width) if polygons else None
    size, counts = segmentation["size"], segmentation["counts"]
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else None
    runs = counts if text is None else _runs(text)
    if size != [height, width] or not isinstance(runs, list):
        return None
    # pycocotools would read memory that is not its own
    if not all(type(n) is int and n >= 0 for n in runs) or sum(runs) != height * width:
        return None
    if text is not None:
        return {"size": size, "counts": text}
    rle: Rle = _api().frPyObjects({"size": size, "counts": runs}, height, width)
    return rle


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


def decode(rle: Rle) -> np.ndarray:
    """Returns a mask as (H, W) uint8 of 0 and 1."""
    return np.asarray(_api().decode(rle))


def area(rle: Rle) -> int:
    return int(_api().area(rle))


def encode(masks: np.ndarray) -> list[Rle]:
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
    return [int(n) for n in np.diff(bounds)]

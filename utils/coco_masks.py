"""Masks in COCO's encodings: polygons, run lengths as a list, run lengths as text.

faster-coco-eval's routines where installed, else pycocotools'; both give the same bytes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.errors import UserError

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


def usable_polygons(segmentation: Any) -> list[list[float]]:
    """The parts of a COCO segmentation that are polygons: 3 or more finite corners, some area."""
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        return []
    return [part for part in segmentation if _is_polygon(part)]


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, Sequence) or len(part) < 6 or len(part) % 2:
        return False
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in part):
        return False
    x, y = np.asarray(part, dtype=float).reshape(-1, 2).T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) > 1e-6  # twice the area


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Run lengths of any COCO segmentation; None where it holds no mask of this size.

    Returns:
        {"size": [height, width], "counts": bytes}, as the mask routines take it.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(size, Sequence) or list(size) != [height, width]:
            return None
        if isinstance(counts, str):
            counts = counts.encode()
        runs = _runs(counts) if isinstance(counts, bytes) else counts
        if not isinstance(runs, list) or not all(isinstance(n, int) and n >= 0 for n in runs):
            return None
        if sum(runs) != height * width:  # pycocotools would read memory that is not its own
            return None
        if isinstance(counts, bytes):
            return {"size": [height, width], "counts": counts}
        return _api().frPyObjects(segmentation, height, width)
    polygons = usable_polygons(segmentation)
    if not polygons:
        return None
    return _api().merge(_api().frPyObjects(polygons, height, width))


def _runs(text: bytes) -> list[int] | None:
    """The run lengths that COCO's text stands for; None if it is no such text.

    Six bits a character: five of the number, lowest first, and whether more follow; signed, and
    from the fourth run on less the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64:
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
    """(H, W) uint8 of 0 and 1."""
    return _api().decode(rle)


def area(rle: dict[str, Any]) -> int:
    return int(_api().area(rle))


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Run lengths as text, fit for JSON, of (N, H, W) masks of 0 and 1."""
    if len(masks) == 0:
        return []
    stacked = np.asfortranarray(np.moveaxis(masks, 0, 2).astype(np.uint8))
    return [
        {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}
        for rle in _api().encode(stacked)
    ]


def run_lengths(mask: np.ndarray) -> list[int]:
    """The uncompressed run lengths of one (H, W) mask: zeros first, column by column."""
    flat = np.asarray(mask, dtype=bool).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0] if not flat[:1].any() else [0, 0], edges, [flat.size]])
    return np.diff(bounds).tolist()

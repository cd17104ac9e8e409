"""Masks in COCO's encodings: polygons, run lengths as a list, run lengths as text.

faster-coco-eval's routines where installed, else pycocotools'; both give the same bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.detection.coco_files import is_finite
from utils.system.errors import UserError

FARTHEST = 1e6  # pixels: the rasteriser walks along an edge, and would fill the memory with more

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
    """The parts of a COCO segmentation that are polygons: 3 or more corners, some area."""
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        return []
    return [part for part in segmentation if _is_polygon(part)]


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, Sequence) or len(part) < 6 or len(part) % 2:
        return False
    if not all(is_finite(v) and abs(v) <= FARTHEST for v in part):
        return False
    return _area_and_length(part)[0] > 5e-7


def _area_and_length(polygon: Sequence[float]) -> tuple[float, float]:
    """A polygon's area and the length of its outline, in pixels."""
    corners = np.array(polygon, dtype=float).view(complex)
    edges = np.diff(corners, append=corners[:1])
    return abs(np.vdot(corners, edges).imag) / 2, float(np.abs(edges).sum())


def covers_a_pixel(polygons: Sequence[Sequence[float]], height: int, width: int) -> bool:
    """Whether the mask of polygons, from `usable_polygons`, has a pixel.

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
    return _api().merge(_api().frPyObjects(polygons, height, width))


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
    return _draw(polygons, height, width) if polygons else None


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

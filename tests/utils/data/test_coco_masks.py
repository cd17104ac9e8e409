"""Masks: polygons and run lengths as COCO's own code reads them, also those of other tools."""

import numpy as np
import pytest
import torch
from helpers.coco_trees import SQUARE, annotation, split_of
from pycocotools import mask as pycocotools

from utils.data import coco_masks
from utils.data.coco import check_file, locate
from utils.data.coco_dataset import CocoDataset
from utils.data.coco_eval import GroundTruth

RUNS = [10 * 48 + 10, *(30, 18) * 19, 30, 8 + 34 * 48]  # of SQUARE in an image of 48 × 64


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE[0],
        [[1, 2, 3, 4], *SQUARE],  # a bad polygon beside a good one
        [{"size": [48, 64], "counts": RUNS}],
        {"size": [48.0, 64.0], "counts": [float(n) for n in RUNS]},
        [{"size": [48.0, 64.0], "counts": RUNS}],
    ],
)
def test_masks_that_other_tools_write_a_little_else(tmp_path, segmentation):
    split = split_of(tmp_path, [annotation(segmentation=segmentation)])
    mask = torch.zeros(1, 48, 64, dtype=torch.uint8)
    mask[:, 10:40, 10:30] = 1
    assert torch.equal(CocoDataset(split, 1)[(0, 0)][1]["masks"], mask)


def test_run_lengths_are_cocos():
    chance = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.3, 1.0):
        mask = (chance.random((70, 50)) < share).astype(np.uint8)
        rle = coco_masks.to_rle({"size": [70, 50], "counts": coco_masks.run_lengths(mask)}, 70, 50)
        assert np.array_equal(coco_masks.decode(rle), mask)
        (text,) = coco_masks.encode(mask[None])
        assert coco_masks._runs(text["counts"].encode()) == coco_masks.run_lengths(mask)
        assert np.array_equal(coco_masks.decode(coco_masks.to_rle(text, 70, 50)), mask)


@pytest.mark.parametrize("counts", ["o" * 1_000_000, "0" * 1_000_000])
def test_run_lengths_that_never_end(counts):
    assert coco_masks.to_rle({"size": [48, 64], "counts": counts}, 48, 64) is None


def random_polygon(chance, kind):
    """Corners in no order, in reading order (a signed area of 0), or gone around twice."""
    corners = chance.uniform(2, 46, (int(chance.integers(3, 7)), 2)).round(1).tolist()
    if kind == "reading":
        (x1, y1), (x2, y2) = sorted(corners[0]), sorted(corners[1])
        corners = [[x1, y1], [x2, y1], [x1, y2], [x2, y2]]
    if kind == "twice":
        corners *= 2
    return [value for corner in corners for value in corner]


@pytest.mark.parametrize("kind", ["any", "reading", "twice"])
def test_a_polygon_is_what_pycocotools_draws(tmp_path, kind):
    chance = np.random.default_rng(0)
    polygons = [random_polygon(chance, kind) for _ in range(200)]
    if kind == "reading":
        polygons.append([10, 10, 30, 10, 10, 40, 30, 40])
    drawn = [pycocotools.area(pycocotools.frPyObjects([p], 48, 64)[0]) for p in polygons]
    assert kind != "reading" or drawn[-1] == 300
    faults = [coco_masks.mask_fault([polygon], 48, 64) for polygon in polygons]
    assert faults == [None if pixels else coco_masks.NO_PIXEL for pixels in drawn]
    ours = [coco_masks.area(coco_masks.to_rle([polygon], 48, 64)) for polygon in polygons]
    assert ours == drawn


EVEN = [*RUNS[:-1], RUNS[-1] - 9, 9]  # an even count: they could be corners


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (EVEN, coco_masks.BARE_RUNS),
        ([float(n) for n in EVEN], coco_masks.BARE_RUNS),
        ([500, 30, 18, 30, 18, 45], coco_masks.ELSEWHERE),  # cut short: no image's run lengths
        ([[35, 10, 60, 10, 60, 40, 35, 40]], coco_masks.ELSEWHERE),
        ({"size": [48, 64], "counts": [40 * 48, 5, 43, 5, 23 * 48 - 5]}, coco_masks.ELSEWHERE),
    ],
)
def test_a_mask_that_is_not_where_its_box_is(tmp_path, segmentation, reason):
    """Drawn as a polygon, plain run lengths would be a mask far from the object."""
    bad = annotation(2, 2, segmentation=segmentation)
    (line,) = split_of(tmp_path, [annotation(), bad]).report("val")[1:]
    assert reason in line
    assert "picture-2.png" in line
    faults = check_file(locate(tmp_path, "val"))[1]
    assert [reason in said for _, said in faults] == [True]
    (line,) = GroundTruth(locate(tmp_path, "val"), masks=True).report("val")[1:]
    assert line == f"  ! 1 object that no detection can match: {reason} (first in picture-2.png)"


@pytest.mark.parametrize(
    "segmentation",
    [
        [[10, 10, 15, 10, 15, 14]],  # a part of its box
        [[5, 5, 35, 5, 35, 45, 5, 45]],  # more than its box
        [[9.5, 9.5, 30.4, 9.5, 30.4, 40.4, 9.5, 40.4]],
        [[10, 10, 12, 10, 12, 12], [28, 38, 30, 38, 30, 40]],
    ],
)
def test_a_mask_that_is_where_its_box_is(tmp_path, segmentation):
    assert len(split_of(tmp_path, [annotation(segmentation=segmentation)]).labels) == 1
    assert GroundTruth(locate(tmp_path, "val"), masks=True).report("val")[1:] == []

"""mmdetection v1's box coding and RoIAlign where they are not torchvision's."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from models.eca_detection import DETECTORS, create_detector
from models.eca_detection_geometry import LegacyRoIAlign


@pytest.mark.parametrize("arch", DETECTORS)
def test_a_box_shrinks_and_grows_within_limits(arch):
    with torch.device("meta"):
        detector = create_detector(arch, "resnet18", legacy=True)
    parts = (detector,) if arch == "retinanet" else (detector.rpn, detector.roi_heads)
    for part in parts:
        coder = part.box_coder
        boxes = torch.tensor([[100.0, 200.0, 1100.0, 2200.0]])
        codes = torch.tensor([[0.0, 0.0, -99.0, -99.0, 0.0, 0.0, 99.0, 99.0]])
        before = codes.clone()
        decoded = coder.decode_single(codes, boxes).reshape(2, 4)
        sizes = decoded[:, 2:] - decoded[:, :2]
        expected = torch.tensor([[16.0, 32.0], [62_500.0, 125_000.0]])
        torch.testing.assert_close(sizes, expected, rtol=1e-3, atol=0)
        assert torch.equal(codes, before)


def ramps(size=256):
    """P2 to P5 of two images whose values are the column, plus 100 times the row, negated in the
    second."""
    maps = {}
    for level in range(4):
        side = torch.arange(size / (4 << level))
        ramp = side[None] + 100 * side[:, None]
        maps[str(level)] = torch.stack([ramp, -ramp])[:, None]
    return maps


def test_legacy_roi_align_leaves_small_regions_small():
    boxes = torch.tensor([
        [8.0, 12.0, 10.0, 15.0], [9.0, 9.0, 9.5, 40.0],  # under a cell of P2 wide
        [8.0, 8.0, 60.0, 40.0], [20.0, 8.0, 180.0, 140.0], [30.0, 30.0, 240.0, 200.0],
    ])  # fmt: skip
    pool = LegacyRoIAlign(7)
    found = pool(ramps(), [boxes, boxes], [(256, 256)] * 2)
    # A mean of samples on a ramp is the value at their middle: mmdetection v1's formula by hand.
    level = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().div(56).log2().floor().clamp(0, 3)
    start, end = (boxes / (4 * 2**level[:, None])).split(2, 1)
    steps = (torch.arange(7) + 0.5) / 7
    middle = start[..., None] + (end - start)[..., None] * steps  # region, (x, y), bin
    expected = middle[:, 0, None, :] + 100 * middle[:, 1, :, None]
    torch.testing.assert_close(found[:5, 0], expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found[5:, 0], -expected, rtol=1e-5, atol=1e-3)
    assert set(level.tolist()) == {0, 1}

    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    other = theirs(ramps(), [boxes, boxes], [(256, 256)] * 2)
    torch.testing.assert_close(found[2:5], other[2:5], rtol=1e-5, atol=1e-3)
    assert (found[:2] - other[:2]).abs().amax((1, 2, 3)).min() > 0.2
    assert pool(ramps(), [boxes[:0]] * 2, [(256, 256)] * 2).shape == (0, 1, 7, 7)


@pytest.mark.parametrize("legacy", [False, True])
def test_who_pools_how(legacy):
    with torch.device("meta"):
        heads = create_detector("mask_rcnn", "resnet18", legacy=legacy, mask_pool=10).roi_heads
    pools = [(pool, pool.output_size[0]) for pool in (heads.box_roi_pool, heads.mask_roi_pool)]
    assert [size for _, size in pools] == [7, 10]
    assert all(isinstance(pool, LegacyRoIAlign) == legacy for pool, _ in pools)

"""Anchors, and mmdetection v1's geometry: anchors, box coding, sizes, P6 and P7, RoIAlign."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from models.detection.detectors import DETECTORS, create_detector
from models.detection.geometry import (
    DetectorTransform,
    LegacyP6P7,
    LegacyRoIAlign,
    LegacyTransform,
    PyramidAnchors,
    clip_pixels,
)


def test_anchors_are_float32_on_the_strides_of_the_pyramid():
    strides = (4, 8, 16, 32, 64)
    generator = PyramidAnchors([[8 * s] for s in strides], strides)
    sizes = [(200, 320), (100, 160), (50, 80), (25, 40), (13, 20)]
    maps = [torch.zeros(1, 1, *s, dtype=torch.bfloat16) for s in sizes]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 800, 1280), [(800, 1280)]), maps)
    assert anchors.dtype == torch.float32
    assert len(anchors) == 3 * sum(h * w for h, w in sizes)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert torch.equal(centres[-1], torch.tensor([19 * 64.0, 12 * 64.0]))


def mmdetection_v1_anchors(base, scales, ratios, stride, rows, columns):
    """The definition by loops: boxes as (first pixel, last pixel), ratio before scale."""
    anchors = []
    for row in range(rows):
        for column in range(columns):
            for ratio in ratios:
                for scale in scales:
                    w, h = base * scale / ratio**0.5, base * scale * ratio**0.5
                    middle = 0.5 * (base - 1)
                    box = [
                        middle - 0.5 * (w - 1),
                        middle - 0.5 * (h - 1),
                        middle + 0.5 * (w - 1),
                        middle + 0.5 * (h - 1),
                    ]
                    shift = [column * stride, row * stride] * 2
                    anchors.append([round(v) + s for v, s in zip(box, shift, strict=True)])
    return torch.tensor(anchors, dtype=torch.float32)


@pytest.mark.parametrize("arch", ["faster_rcnn", "retinanet"])
def test_legacy_anchors(arch):
    with torch.device("meta"):
        detector = create_detector(arch, "resnet18", legacy=True)
    single = arch == "retinanet"
    generator = detector.anchor_generator if single else detector.rpn.anchor_generator
    strides = (8, 16, 32, 64, 128) if single else (4, 8, 16, 32, 64)
    scales = [4 * 2 ** (i / 3) for i in range(3)] if single else [8]
    maps = [torch.zeros(1, 1, 3, 5)] * 5
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 99, 99), [(99, 99)]), maps)
    expected = torch.cat(
        [mmdetection_v1_anchors(s, scales, (0.5, 1.0, 2.0), s, 3, 5) for s in strides]
    )
    assert torch.equal(anchors - torch.tensor([0, 0, 1, 1]), expected)


def test_legacy_box_coding_is_torchvisions_on_ends():
    """mmdetection v1's decoding, + 1 in every width, against the coder that the detectors use."""
    torch.manual_seed(0)
    first = torch.rand(50, 2) * 100
    last = first + torch.rand(50, 2) * 80
    deltas = torch.randn(50, 4) * 0.3
    size = last - first + 1
    middle = (first + last) / 2 + deltas[:, :2] * size
    grown = size * deltas[:, 2:].exp()
    decoded_first, decoded_last = middle - grown / 2 + 0.5, middle + grown / 2 - 0.5

    with torch.device("meta"):
        coder = create_detector("faster_rcnn", "resnet18", legacy=True).rpn.box_coder
    found = coder.decode_single(deltas, torch.cat([first, last + 1], 1))
    torch.testing.assert_close(found, torch.cat([decoded_first, decoded_last + 1], 1))


@pytest.mark.parametrize("training", [False, True])
def test_resizing_is_torchvisions(training):
    """Sizes of many images, and pixels, boxes and masks of a few."""
    generator = torch.Generator().manual_seed(0)
    for i in range(1000):
        h, w = torch.randint(20, 700, (2,), generator=generator).tolist()
        shorter, more = torch.randint(60, (2,), generator=generator).tolist()
        shorter, longer = shorter + 40, shorter + more + 40  # small, to be quick
        full = i < 30
        limits = ((shorter, shorter + 7) if training else shorter, longer, [0.4] * 3, [0.2] * 3)
        image = torch.rand(3, h, w, generator=generator) if full else torch.zeros(1, h, w)
        sized = []
        for kind in (DetectorTransform, GeneralizedRCNNTransform):
            transform = kind(*limits).train(training)
            target = None
            if full:
                target = {
                    "boxes": torch.tensor([[1.0, 2.0, w - 3.0, h - 4.0]]),
                    "masks": (image[:2] > 0.5).byte(),
                }
            torch.manual_seed(i)
            sized.append(transform.resize(image, target))
        (ours, our_target), (theirs, their_target) = sized
        assert ours.shape == theirs.shape, (h, w, limits)
        if full:
            assert torch.equal(ours, theirs)
            assert torch.equal(our_target["boxes"], their_target["boxes"])
            assert torch.equal(our_target["masks"], their_target["masks"])
            assert our_target["masks"].shape[1:] == ours.shape[1:]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [(2000, 1), (3, 4000)])
@pytest.mark.parametrize("arch", ["retinanet", "mask_rcnn"])
def test_images_of_extreme_proportions_keep_a_pixel(arch, size, legacy):
    """2000 × 1 would become 333 × 0 and 3 × 4000 0 × 333."""
    torch.manual_seed(0)
    detector = create_detector(
        arch,
        "resnet18",
        num_classes=3,
        width=16,
        norm="bn",
        trainable_layers=5,
        legacy=legacy,
        min_size=200,
        max_size=333,
        **({"score_thresh": 0.0} if arch == "retinanet" else {"box_score_thresh": 0.0}),
    )
    h, w = size
    image = torch.rand(3, h, w)
    box = torch.tensor([[0.0, 0.0, w, h // 2]])
    masks = torch.zeros(1, h, w, dtype=torch.uint8)
    masks[:, : int(box[0, 3]), : int(box[0, 2])] = 1
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": masks}
    batch, (resized,) = detector.transform([image], [target])
    expected = (333, 1) if h > w else (1, 333)
    assert [tuple(s) for s in batch.image_sizes] == [expected]
    assert resized["masks"].shape[1:] == expected
    assert (resized["boxes"][:, 2:] > resized["boxes"][:, :2]).all()

    losses = detector([image] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        (found,) = detector.eval()([image])
    assert len(found["boxes"]) > 0
    assert all(value.isfinite().all() for value in found.values())
    limit = torch.tensor([w, h, w, h])
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= limit + 1e-3).all()
    if arch == "mask_rcnn":
        assert found["masks"].shape[1:] == (1, h, w)


@pytest.mark.parametrize(
    ("image", "limits", "resized", "pixel", "expected"),
    [
        ((419, 637), (320, 500), (320, 486), 485, 635.05),
        ((427, 640), (800, 1333), (800, 1199), 1198, 639.43),
    ],
)
def test_legacy_resizing_by_one_factor(image, limits, resized, pixel, expected):
    """mmcv's imrescale: one factor, and only the image's size is rounded."""
    transform = LegacyTransform(*limits, [0.0] * 3, [1.0] * 3).eval()
    boxes = torch.tensor([[10.0, 20.0, 30.0, 50.0]])  # last pixel 29, 49
    images, targets = transform([torch.rand(3, *image)], [{"boxes": boxes}])
    assert images.image_sizes == [resized]
    factor = min(limits[1] / max(image), limits[0] / min(image))
    by_hand = [10 * factor, 20 * factor, 29 * factor + 1, 49 * factor + 1]
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([by_hand]))
    found = [{"boxes": torch.tensor([[0.0, 0.0, pixel + 1, pixel + 1]])}]
    (back,) = transform.postprocess(found, images.image_sizes, [image])
    assert back["boxes"][0, 2].item() - 1 == pytest.approx(expected, abs=0.005)
    assert back["boxes"][0, 3].item() - 1 == pytest.approx(expected, abs=0.005)


def test_legacy_clipping_keeps_boxes_of_one_pixel():
    boxes = torch.tensor([[-9.0, 4.0, -2.0, 9.0], [70.0, -3.0, 90.0, 99.0], [3.0, 4.0, 64.0, 48.0]])
    expected = [[0.0, 4.0, 1.0, 9.0], [63.0, 0.0, 64.0, 48.0], [3.0, 4.0, 64.0, 48.0]]
    assert torch.equal(clip_pixels(boxes, (48, 64)), torch.tensor(expected))


def test_legacy_pyramid_has_no_relu_before_p7():
    with torch.device("meta"):
        legacy = create_detector("retinanet", "resnet18", legacy=True).backbone.fpn.extra_blocks
    assert isinstance(legacy, LegacyP6P7)
    block = LegacyP6P7(8, 4)
    c5 = torch.randn(1, 8, 8, 8)
    levels, names = block([torch.randn(1, 4, 8, 8)], [c5], ["2"])
    assert names == ["2", "p6", "p7"]
    assert (levels[1] < 0).any()
    torch.testing.assert_close(levels[2], block.p7(block.p6(c5)))


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
    boxes = torch.tensor(
        [
            [8.0, 12.0, 10.0, 15.0],
            [9.0, 9.0, 9.5, 40.0],  # under a cell of P2 wide
            [8.0, 8.0, 60.0, 40.0],
            [20.0, 8.0, 180.0, 140.0],
            [30.0, 30.0, 240.0, 200.0],
        ]
    )
    pool = LegacyRoIAlign(7)
    found = pool(ramps(), [boxes, boxes], [(256, 256)] * 2)
    # A mean of samples on a ramp is the value at their middle: mmdetection v1's formula by hand.
    level = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().div(56).log2().floor().clamp(0, 3)
    start, end = (boxes / (4 * 2 ** level[:, None])).split(2, 1)
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

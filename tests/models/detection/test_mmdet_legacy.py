"""mmdetection v1's geometry (anchors, box coding, sizes, P6 and P7, RoIAlign) and its choice of
detections, against loops written from its rules."""

import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from models.detection.detectors import DETECTORS, create_detector
from models.detection.mmdet_legacy import (
    LegacyP6P7,
    LegacyRoIAlign,
    LegacyTransform,
    ScaledSize,
    choose_detections,
    clip_pixels,
)

SIZE, SCALE = (40, 61), 0.37  # of a resized image, and its factor
THRESHOLD, OVERLAP, LIMIT = 0.05, 0.5, 20


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


def decode(anchor, code, weights):
    """delta2bbox: boxes as (first pixel, last pixel), clipped to [0, side - 1]."""
    limit = math.log(1000 / 16)
    dx, dy, dw, dh = (c / w for c, w in zip(code, weights, strict=True))
    x1, y1, x2, y2 = anchor[0], anchor[1], anchor[2] - 1, anchor[3] - 1
    w, h = x2 - x1 + 1, y2 - y1 + 1
    x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
    w *= math.exp(min(max(dw, -limit), limit))
    h *= math.exp(min(max(dh, -limit), limit))
    box = [x - w / 2 + 0.5, y - h / 2 + 0.5, x + w / 2 - 0.5, y + h / 2 - 0.5]
    last = [SIZE[1] - 1, SIZE[0] - 1] * 2
    return [min(max(v, 0), end) for v, end in zip(box, last, strict=True)]


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return both / (sum(areas) - both)


def choose(candidates):
    """Rescaling first, then NMS in each class; candidates are (score, label, box)."""
    chosen = []
    for score, label, box in sorted(candidates, reverse=True):
        box = [v / SCALE for v in box]
        if score > THRESHOLD and all(
            overlap(box, other) <= OVERLAP for _, kind, other in chosen if kind == label
        ):
            chosen.append((score, label, box))
    return chosen[:LIMIT]


def check(boxes, scores, labels, expected):
    assert len(expected) > 10
    assert labels.tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(scores.double(), torch.tensor([s for s, _, _ in expected]).double())
    pixels = (boxes - torch.tensor([0, 0, 1, 1])).double() / SCALE
    wanted = torch.tensor([box for _, _, box in expected], dtype=torch.float64)
    torch.testing.assert_close(pixels, wanted, atol=0.004, rtol=0)


def regions(n):
    """Boxes with ends, many of them crowded at an edge or beyond it."""
    first = torch.rand(n, 2) * torch.tensor([70.0, 50.0]) - 5
    return torch.cat([first, first + 1 + 12 * torch.rand(n, 2)], 1)


@pytest.mark.parametrize("seed", range(3))
def test_rcnn(seed):
    settings = {
        "box_score_thresh": THRESHOLD,
        "box_nms_thresh": OVERLAP,
        "box_detections_per_img": LIMIT,
    }
    with torch.device("meta"):
        detector = create_detector(
            "faster_rcnn", "resnet18", num_classes=3, legacy=True, **settings
        )
    torch.manual_seed(seed)
    proposals, logits, codes = regions(60), 2 * torch.randn(60, 3), 2 * torch.randn(60, 12)
    heads = detector.roi_heads
    (boxes,), (scores,), (labels,) = heads.postprocess_detections(
        logits, codes, [proposals], [ScaledSize(SIZE, SCALE)]
    )
    candidates = []
    for box, row, code in zip(proposals.tolist(), logits.tolist(), codes.tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        for c in (1, 2):
            found = decode(box, code[4 * c : 4 * c + 4], (10, 10, 5, 5))
            candidates.append((math.exp(row[c]) / total, c, found))
    check(boxes, scores, labels, choose(candidates))


@pytest.mark.parametrize("seed", range(3))
def test_retinanet(seed):
    top = 25
    settings = {"score_thresh": THRESHOLD, "nms_thresh": OVERLAP, "topk_candidates": top}
    with torch.device("meta"):
        detector = create_detector(
            "retinanet",
            "resnet18",
            num_classes=2,
            legacy=True,
            detections_per_img=LIMIT,
            **settings,
        )
    torch.manual_seed(seed)
    anchors = [regions(40), regions(15)]
    logits = [torch.randn(1, len(a), 2) - 1 for a in anchors]
    codes = [0.3 * torch.randn(1, len(a), 4) for a in anchors]
    outputs = {"cls_logits": logits, "bbox_regression": codes}
    (found,) = detector.postprocess_detections(outputs, [anchors], [ScaledSize(SIZE, SCALE)])
    candidates = []
    for level, rows, deltas in zip(anchors, logits, codes, strict=True):
        cells = zip(rows[0].tolist(), level.tolist(), deltas[0].tolist(), strict=True)
        for row, box, code in sorted(cells, key=lambda cell: -max(cell[0]))[:top]:
            decoded = decode(box, code, (1, 1, 1, 1))
            candidates += [(1 / (1 + math.exp(-v)), c, decoded) for c, v in enumerate(row)]
    check(found["boxes"], found["scores"], found["labels"], choose(candidates))


@pytest.mark.parametrize(
    ("scale", "height", "chosen"),
    [
        (1.0, 20.0, 2),  # an overlap of 10 / 20, which is not more than 0.5
        (2.0, 20.0, 1),  # in the image (9 / 2 + 1) / (19 / 2 + 1) = 0.52
        (0.5, 19.8, 2),  # 10 / 19.8 = 0.505, in the image (9 * 2 + 1) / (18.8 * 2 + 1) = 0.49
    ],
)
def test_overlaps_count_in_pixels_of_the_image(scale, height, chosen):
    """Two boxes whose overlap is on either side of 0.5 in the resized and the original image."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, height]])
    last = [[v / scale for v in (b - torch.tensor([0, 0, 1, 1])).tolist()] for b in boxes]
    assert (overlap(*last) > OVERLAP) == (chosen == 1)
    scores = torch.tensor([[0.9], [0.8]])
    found, _, _ = choose_detections(boxes[:, None], scores, scale, THRESHOLD, OVERLAP, LIMIT)
    assert torch.equal(found, boxes[:chosen])


def test_the_region_proposals_keep_boxes_of_one_pixel():
    with torch.device("meta"):
        rpn = create_detector("faster_rcnn", "resnet18", num_classes=3, legacy=True).rpn.eval()
    outside = torch.tensor([[[-30.0, 5.0, -10.0, 20.0], [80.0, 5.0, 95.0, 20.0]]])
    (boxes,), _ = rpn.filter_proposals(outside, torch.tensor([[2.0, 1.0]]), [SIZE], [2])
    assert boxes.tolist() == [[0.0, 5.0, 1.0, 20.0], [60.0, 5.0, 61.0, 20.0]]


@pytest.mark.parametrize("arch", ["faster_rcnn", "retinanet"])
def test_a_fixed_size_is_refused(arch):
    with torch.device("meta"), pytest.raises(ValueError, match="keeps proportions"):
        create_detector(arch, "resnet18", legacy=True, fixed_size=(64, 64))

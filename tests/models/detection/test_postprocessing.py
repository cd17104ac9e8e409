"""mmdetection v1's choice of detections, against a loop in float64 written from its rules."""

import math

import pytest
import torch

from models.detection.detectors import create_detector
from models.detection.geometry import ScaledSize

SIZE, SCALE = (40, 61), 0.37  # of a resized image, and its factor
THRESHOLD, OVERLAP, LIMIT = 0.05, 0.5, 20


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

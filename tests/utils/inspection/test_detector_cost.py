"""Counts of the published COCO table, and what they do to the network they are taken of."""

import pytest
import torch
from torch import nn

from models.detection.detectors import create_detector
from utils.inspection.cost import detection_macs, published_detection_flops

# detector, backbone, trainable parameters, published FLOPs, multiply-adds in G as published
TABLE = [
    ("faster_rcnn", "eca_resnet50", 41_531_877, 207_181_949_620, 206.335),
    ("faster_rcnn", "eca_resnet101", 60_524_088, 283_324_635_316, 282.09),
    ("mask_rcnn", "eca_resnet50", 44_175_424, 275_688_594_164, 259.340),
    ("mask_rcnn", "eca_resnet101", 63_167_625, 351_831_260_916, 335.10),
    ("retinanet", "eca_resnet50", 37_743_423, 239_429_234_984, 238.536),
    ("retinanet", "eca_resnet101", 56_735_624, 315_571_901_736, 314.30),
]


@pytest.mark.parametrize(("arch", "backbone", "parameters", "flops", "macs"), TABLE)
def test_published_row(arch, backbone, parameters, flops, macs):
    with torch.device("meta"):
        detector = create_detector(arch, backbone)
    trainable = [p.numel() for p in detector.parameters() if p.requires_grad]
    assert sum(trainable) == parameters
    assert published_detection_flops(detector) == flops
    digits = len(str(macs).partition(".")[2])
    assert round(detection_macs(detector) / 1e9, max(digits, 2)) == macs


def test_counting_leaves_the_network_alone():
    detector = create_detector("mask_rcnn", "eca_resnet18", num_classes=3).train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detection_macs(detector, (64, 64))
    assert detector.training
    assert not any(module._forward_hooks for module in detector.modules())
    after = detector.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_counting_by_hand():
    """One pyramid level less a hand count: a doubled image is 4 times the work outside the RoIs."""
    with torch.device("meta"):
        detector = create_detector("retinanet", "resnet18", num_classes=5)
    small, large = (detection_macs(detector, (128 * n, 128 * n)) for n in (1, 2))
    assert large == 4 * small
    with torch.device("meta"):
        more = create_detector("retinanet", "resnet18", num_classes=6)
    cells = 16**2 + 8**2 + 4**2 + 2**2 + 1
    assert detection_macs(more, (128, 128)) - small == cells * 9 * 256 * 9


def test_transposed_convolution():
    """Its multiply-adds go by input positions; the table's rule takes output positions, 4 times."""
    with torch.device("meta"):
        mask, box = (create_detector(arch, "resnet18") for arch in ("mask_rcnn", "faster_rcnn"))
    convolutions = 100 * 14 * 14 * 4 * 256 * 256 * 9
    upsampling = 100 * 14 * 14 * 256 * 256 * 4
    logits = 100 * 28 * 28 * 256 * 81
    extra = detection_macs(mask) - detection_macs(box)
    assert extra == convolutions + upsampling + logits
    rest = 100 * (14 * 14 * 256 * 4 * 2 + 28 * 28 * 256 * 2 + 28 * 28 * 81)  # biases and ReLUs
    published = published_detection_flops(mask) - published_detection_flops(box)
    assert published == extra + 3 * upsampling + rest


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="Linear is not a detector"):
        detection_macs(nn.Linear(2, 2))

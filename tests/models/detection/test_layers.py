"""Anchors and resizing, which differ a little from torchvision's."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from models.detection.detectors import create_detector
from models.detection.layers import DetectorTransform, PyramidAnchors


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


@pytest.mark.parametrize(
    ("arch", "size", "legacy"),
    [
        ("retinanet", (2000, 1), False),
        ("retinanet", (3, 4000), True),
        ("mask_rcnn", (3, 4000), False),
        ("mask_rcnn", (2000, 1), True),
    ],
)
def test_images_of_extreme_proportions_keep_a_pixel(arch, size, legacy):
    """2000 × 1 would become 333 × 0 and 3 × 4000 0 × 333."""
    torch.manual_seed(0)
    settings = {"width": 16, "norm": "bn", "min_size": 200, "max_size": 333}
    settings["score_thresh" if arch == "retinanet" else "box_score_thresh"] = 0.0
    detector = create_detector(arch, "resnet18", num_classes=3, legacy=legacy, **settings)
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
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        (found,) = detector.eval()([image])
    assert len(found["boxes"]) > 0
    assert all(value.isfinite().all() for value in found.values())
    assert (found["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
    if arch == "mask_rcnn":
        assert found["masks"].shape[1:] == (1, h, w)


def test_a_target_says_which_of_the_sizes_was_drawn():
    image, box = torch.rand(3, 60, 90), torch.tensor([[3.0, 4.0, 50.0, 40.0]])
    transform = DetectorTransform((32, 48, 64), 200, [0.5] * 3, [0.25] * 3)
    for size in (32, 48):
        target = {"boxes": box, "labels": torch.tensor([1]), "min_size": size}
        batch, (resized,) = transform.train()([image], [target])
        theirs = GeneralizedRCNNTransform((size,), 200, [0.5] * 3, [0.25] * 3).train()
        expected, (wanted,) = theirs([image], [{k: target[k] for k in ("boxes", "labels")}])
        assert torch.equal(batch.tensors, expected.tensors)
        assert torch.equal(resized["boxes"], wanted["boxes"])
        assert "min_size" not in resized
    assert transform.eval()([image])[0].image_sizes == [(64, 96)]

"""Pictures of detections, by the pixels that must change and those that must not."""

import io

import torch
from PIL import Image

from utils.detection.drawing import COLOURS, draw, png, side_by_side


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def found(n=2, masks=False):
    boxes = torch.tensor([[10.0, 20.0, 30.0, 50.0], [40.0, 5.0, 60.0, 15.0]])[:n]
    result = {
        "boxes": boxes,
        "labels": torch.tensor([0, 1])[:n],
        "scores": torch.tensor([0.9, 0.2])[:n],
    }
    if masks:
        result["masks"] = torch.zeros(n, 1, 64, 64)
        result["masks"][0, 0, 30:40, 15:25] = 1.0
    return result


def test_boxes_have_their_class_colour():
    blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture = draw(blank, found(), ["cat", "dog"])
    assert picture[:, 45, 10].tolist() == rgb(COLOURS[0])
    assert picture[:, 10, 60].tolist() == rgb(COLOURS[1])
    assert picture[:, 60, 5].tolist() == [0, 0, 0]
    assert not blank.any()


def test_masks_are_see_through():
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    picture = draw(grey, found(masks=True), ["cat", "dog"])
    half = [(100 + value) // 2 for value in rgb(COLOURS[0])]
    assert all(abs(a - b) <= 1 for a, b in zip(picture[:, 35, 20].tolist(), half, strict=True))


def test_doubtful_detections_are_left_out():
    blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture = draw(blank, found(), ["cat", "dog"], least_score=0.5)
    assert picture[:, 10, 60].tolist() == [0, 0, 0]
    nothing = draw(blank, found(), ["cat", "dog"], least_score=0.95)
    assert torch.equal(nothing, blank)


def test_pairs_side_by_side():
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 32, 64, dtype=torch.uint8)]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    truths = [{k: v for k, v in found(masks=True).items() if k != "scores"}, none]
    picture = side_by_side(images, truths, [found(masks=True), none], ["cat", "dog"], side=128)
    assert picture.shape == (3, 128 + 4, 4 * 128 + 10)
    assert picture[:, 2 + 90, 2 + 20].tolist() == rgb(COLOURS[0])  # twice as large, in its place
    with Image.open(io.BytesIO(png(picture))) as image:
        assert image.size == (picture.shape[2], picture.shape[1])

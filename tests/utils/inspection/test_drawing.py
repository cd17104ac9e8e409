"""Pictures of detections, by the pixels that must change and those that must not."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from utils.inspection.drawing import (
    BORDER,
    COLOURS,
    SHARE,
    TITLE,
    draw,
    place_labels,
    side_by_side,
)


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def objects(n=2, masks=False):
    boxes = torch.tensor([[10.0, 20.0, 30.0, 50.0], [70.0, 25.0, 100.0, 55.0]])[:n]
    result = {
        "boxes": boxes,
        "labels": torch.tensor([0, 1])[:n],
        "scores": torch.tensor([0.9, 0.2])[:n],
    }
    if masks:
        result["masks"] = torch.zeros(n, 1, 128, 128)
        result["masks"][0, 0, 30:40, 15:25] = 1.0
        result["masks"][1:, 0, 30:40, 20:30] = 1.0
    return result


def test_boxes_have_their_class_colour():
    blank = torch.zeros(3, 128, 128, dtype=torch.uint8)
    picture = draw(blank, objects(), ["cat", "dog"])
    assert picture[:, 45, 10].tolist() == rgb(COLOURS[0])
    assert picture[:, 40, 100].tolist() == rgb(COLOURS[1])
    assert picture[:, 120, 2].tolist() == [0, 0, 0]
    assert not blank.any()


def test_masks_keep_their_class_colour_where_they_overlap():
    grey = torch.full((3, 128, 128), 100, dtype=torch.uint8)
    picture = draw(grey, objects(masks=True), ["cat", "dog"])
    for column, colour in ((18, COLOURS[0]), (22, COLOURS[0]), (27, COLOURS[1])):
        tint = [100 + SHARE * (value - 100) for value in rgb(colour)]
        assert picture[:, 36, column].tolist() == pytest.approx(tint, abs=1)


def test_doubtful_detections_are_left_out():
    blank = torch.zeros(3, 128, 128, dtype=torch.uint8)
    picture = draw(blank, objects(), ["cat", "dog"], least_score=0.5)
    assert picture[:, 40, 100].tolist() == [0, 0, 0]
    nothing = draw(blank, objects(), ["cat", "dog"], least_score=0.95)
    assert torch.equal(nothing, blank)


def overlaps(places, sizes):
    rectangles = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(places, sizes, strict=True)]
    return sum(
        max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
        for i, a in enumerate(rectangles)
        for b in rectangles[i + 1 :]
    )


def test_labels_stand_at_their_boxes_and_cover_one_another_only_without_room():
    chance = np.random.default_rng(0)
    corners = chance.integers(0, 280, (20, 2))
    boxes = np.concatenate([corners, corners + chance.integers(20, 60, (20, 2))], 1).tolist()
    sizes = [(int(width), 16) for width in chance.integers(30, 90, 20)]
    places = place_labels(boxes, sizes, (320, 320))
    assert overlaps(places, sizes) == 0
    for (x, y), (w, h), (x1, y1, x2, y2) in zip(places, sizes, boxes, strict=True):
        assert 0 <= x <= 320 - w
        assert 0 <= y <= 320 - h
        assert max(x1 - x - w, x - x2, y1 - y - h, y - y2) <= 0  # they touch
    # Twelve in one box: as many as fit around it, and none far away.
    boxes, sizes = [[100, 100, 190, 164]] * 12, [(60, 16)] * 12
    places = place_labels(boxes, sizes, (320, 320))
    assert places[0] == (100, 84)
    assert overlaps(places[:8], sizes[:8]) == 0
    places = place_labels([[0, 0, 20, 20]] * 9, [(20, 16)] * 9, (32, 32))
    assert len(places) == 9


def test_pairs_side_by_side():
    images = [
        torch.zeros(3, 128, 128, dtype=torch.uint8),
        torch.zeros(3, 64, 128, dtype=torch.uint8),
    ]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    truths = [{k: v for k, v in objects(masks=True).items() if k != "scores"}, none]
    picture = side_by_side(images, truths, [objects(masks=True), none], ["cat", "dog"], side=256)
    assert picture.size == (4 * (256 + BORDER) + BORDER, TITLE + 256 + 2 * BORDER)
    # twice as large, in its place
    assert list(picture.getpixel((BORDER + 20, TITLE + BORDER + 90))) == rgb(COLOURS[0])
    titles = np.asarray(picture)[:TITLE].mean(2) < 128
    columns = [BORDER + i * (256 + BORDER) for i in range(5)]
    assert all(titles[:, left:right].any() for left, right in pairwise(columns))


def test_of_crowded_labels_the_surest_is_on_top():
    """A picture with room for one label: both stand at the same corner."""
    image = torch.zeros(3, 18, 60, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 59.0, 17.0]] * 2)
    crowd = {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.6, 0.9])}
    pixels = draw(image, crowd, ["aaaa", "bbbb"]).permute(1, 2, 0).reshape(-1, 3)
    colours = [torch.tensor(rgb(colour)) for colour in COLOURS[:2]]
    less_sure, surest = (int((pixels == colour).all(1).sum()) for colour in colours)
    assert surest > 5 * less_sure

"""A COCO split: bad annotations one by one, targets, mirroring, batches by aspect ratio."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.coco_trees import SQUARE, annotation, write_tree
from PIL import Image

from utils.data.decoding import BrokenImageError
from utils.detection import coco_masks
from utils.detection.coco_dataset import CocoDataset, load_split, mirror
from utils.detection.coco_files import locate
from utils.detection.demo_shapes import write_shapes
from utils.options.detection import build_parser
from utils.recipes.detection import DetectionRecipe
from utils.system.errors import UserError

NAN = float("nan")


def split_of(root, annotations, masks=True, images=3, **kwargs):
    return load_split(locate(write_tree(root, annotations, images), "val"), masks, **kwargs)


def edit(root, change):
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return locate(root, "val")


def test_classes_and_ids_come_from_the_file(tmp_path):
    split = split_of(tmp_path, [annotation(category_id=7, image_id=2)])
    assert split.classes == ["cat", "dog"]
    assert split.category_ids == [1, 7]
    assert split.labels.tolist() == [1]
    assert split.starts.tolist() == [0, 0, 1, 1]
    image, target, image_id = CocoDataset(split, first_label=1)[(0, 1)]
    assert image.shape == (3, 48, 64)
    assert image.dtype == torch.uint8
    assert image_id == 2
    assert target["boxes"].tolist() == [[10, 10, 30, 40]]
    assert target["labels"].tolist() == [2]
    expected = torch.zeros(48, 64, dtype=torch.uint8)
    expected[10:40, 10:30] = 1
    assert torch.equal(target["masks"], expected[None])
    assert split.report("val")[0] == (
        "val: 3 images, 2 of them without objects, 1 objects of 2 classes"
    )


def test_an_image_without_objects_has_an_empty_target(tmp_path):
    split = split_of(tmp_path, [annotation()])
    _, target, _ = CocoDataset(split, 1)[(0, 2)]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 48, 64)


def test_images_without_objects_are_dropped_on_request(tmp_path):
    split = split_of(tmp_path, [annotation(), annotation(2, 3, 7)], drop_empty=True)
    assert split.image_ids.tolist() == [1, 3]
    _, target, image_id = CocoDataset(split, 0)[(0, 1)]
    assert image_id == 3
    assert target["labels"].tolist() == [1]
    assert target["masks"].sum() == 600


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": (NAN, 1, 20, 30)}, "not finite"),
        ({"bbox": (1, 1, float("inf"), 30)}, "not finite"),
        ({"bbox": (10, 10, 0.5, 30)}, "under 1 pixel"),
        ({"bbox": (10, 10, -5, 30)}, "under 1 pixel"),
        ({"bbox": (64, 10, 20, 30)}, "outside the image"),
        ({"bbox": (-30, 10, 30.5, 30)}, "outside the image"),
        ({"bbox": (1, 2, 3, "4"), "area": 1}, "not four numbers"),
        ({"bbox": (1, 2, 3, 10**400), "area": 1}, "not finite"),
        ({"iscrowd": 1}, "crowd"),
        ({"segmentation": [[1.0, 2.0, 3.0, 4.0]]}, "no polygon"),
        ({"segmentation": [[1, 1, 5, 5, 9, 9]]}, "no polygon"),
        ({"segmentation": [[1, 1, NAN, 5, 9, 2]]}, "no polygon"),
        ({"segmentation": []}, "no polygon"),
        ({"segmentation": None}, "no polygon"),
        ({"segmentation": [[1, 1, 1e9, 5, 9, 2]]}, "no polygon"),
        ({"segmentation": [[100, 100, 110, 100, 110, 110]]}, "without a pixel"),
        ({"segmentation": [[10.1, 10.1, 10.3, 10.1, 10.3, 10.3]]}, "without a pixel"),
        ({"segmentation": [[5, 10.1, 60, 10.1, 60, 10.2]]}, "without a pixel"),
        ({"segmentation": {"size": [48, 64], "counts": [48 * 64]}}, "without a pixel"),
        ({"segmentation": {"size": [64, 48], "counts": [1, 48 * 64 - 1]}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": [1, 2]}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": "zzzz"}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": "P"}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": "\x01"}}, "run-length"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_and_said(tmp_path, changes, reason):
    bad = annotation(2, 2)
    bad.update(changes)
    split = split_of(tmp_path, [annotation(), bad])
    assert len(split.labels) == 1
    (line,) = split.report("val")[1:]
    assert line.startswith("  dropped 1 objects: ")
    assert reason in line
    assert "picture-2.png" in line


def test_boxes_alone_do_not_need_masks(tmp_path):
    split = split_of(tmp_path, [annotation(segmentation=None)], masks=False)
    assert len(split.labels) == 1
    assert "masks" not in CocoDataset(split, 1)[(0, 0)][1]


def test_boxes_are_clipped(tmp_path):
    split = split_of(tmp_path, [annotation(bbox=(-5, 40, 100, 100))])
    assert split.boxes.tolist() == [[0, 40, 64, 48]]


def test_crowds_stay_outside_training(tmp_path):
    assert len(split_of(tmp_path, [annotation(iscrowd=1)], drop_crowds=False).labels) == 1


def test_bad_polygons_beside_a_good_one(tmp_path):
    split = split_of(tmp_path, [annotation(segmentation=[[1, 2, 3, 4], *SQUARE])])
    assert CocoDataset(split, 1)[(0, 0)][1]["masks"].sum() == 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 99}, "annotation 5 is of image_id 99"),
        ({"category_id": 3}, "annotation 5 of image picture-1.png has category_id 3"),
    ],
)
def test_wrong_ids_are_errors(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        split_of(tmp_path, [annotation(5, **changes)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "the list 'images' is missing"),
        (lambda c: c["images"].clear(), "the list 'images' is empty"),
        (lambda c: c["images"][1].pop("width"), r"\[1\] of image picture-2.png has no 'width'"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\] has no 'file_name'"),
        (
            lambda c: c["annotations"][0].pop("bbox"),
            r"annotations\[0\] of image picture-1.png has no 'bbox'",
        ),
        (lambda c: c["annotations"][0].pop("image_id"), r"annotations\[0\] has no 'image_id'"),
        (lambda c: c["annotations"].append(7), r"annotations\[1\] has no 'image_id'"),
        (lambda c: c["images"][1].update(id="2"), "picture-2.png has the id '2', no whole"),
        (lambda c: c["images"][1].update(height="48"), "picture-2.png.*height and width"),
        (lambda c: c["images"][1].update(width=0), "picture-2.png.*height and width"),
        (lambda c: c["images"][1].update(file_name=7), r"images\[1\].*file_name"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"image_id \[1\]"),
        (lambda c: c["images"].append(c["images"][0]), "id 1 twice"),
        (lambda c: c["images"][1].update(id=1), "id 1 twice, picture-1.png and picture-2.png"),
        (lambda c: c["categories"].append(c["categories"][0]), "id 7 twice"),
        (lambda c: c["categories"][0].update(name="cat"), "categories 7 and 1 .* named 'cat'"),
        (lambda c: c["images"][2].update(file_name="gone.png"), "1 of 3 images are missing.*gone"),
    ],
)
def test_bad_files_are_errors(tmp_path, change, message):
    root = write_tree(tmp_path, [annotation()])
    with pytest.raises(UserError, match=message):
        load_split(edit(root, change))


def test_no_json(tmp_path):
    root = write_tree(tmp_path, [])
    path = root / "annotations" / "instances_val2017.json"
    path.write_text('{"images": [')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_split(locate(root, "val"))
    path.write_text("[]")
    with pytest.raises(UserError, match="no COCO annotations"):
        load_split(locate(root, "val"))


def test_places(tmp_path):
    root = write_tree(tmp_path, [])
    with pytest.raises(UserError, match="--train-images"):
        locate(root, "train")
    with pytest.raises(UserError, match="--val-annotations"):
        locate(root, "val", annotations="other.json")
    with pytest.raises(UserError, match="no such folder"):
        locate(root / "nowhere", "val")
    (root / "val2017").rename(root / "pictures")
    assert locate(root, "val", images="pictures").images == root / "pictures"


@pytest.mark.parametrize("part", ["train", "val"])
def test_messages_name_flags_that_exist(tmp_path, part):
    parser = build_parser(DetectionRecipe(), ["faster_rcnn"], ["resnet18"], ["bn"], "")
    place = locate(write_tree(tmp_path, [], part=part), part)

    def flags_of(function, *arguments):
        with pytest.raises(UserError) as error:
            function(*arguments)
        return re.findall(r"--[\w-]+", str(error.value))

    images, annotations = [f"--{part}-images"], [f"--{part}-annotations"]
    assert {*images, *annotations} <= parser._option_string_actions.keys()
    assert flags_of(locate, tmp_path, part, "gone") == images
    assert flags_of(locate, tmp_path, part, None, "gone") == annotations
    (place.images / "picture-2.png").unlink()
    assert flags_of(load_split, place) == images
    place.annotations.unlink()
    assert flags_of(load_split, place) == annotations


def test_an_image_of_another_size_is_named(tmp_path):
    split = split_of(tmp_path, [annotation()])
    Image.new("RGB", (48, 64)).save(tmp_path / "val2017" / "picture-1.png")
    sample = CocoDataset(split, 1)[(0, 0)]
    assert isinstance(sample, BrokenImageError)
    assert "picture-1.png: 48x64 pixels, but 64x48 in the annotations" in str(sample)
    (tmp_path / "val2017" / "picture-2.png").write_bytes(b"no picture")
    assert "picture-2.png" in str(CocoDataset(split, 1)[(0, 1)])


def test_mirroring_moves_box_and_mask_together():
    mask = torch.zeros(1, 6, 10, dtype=torch.uint8)
    mask[0, 1:4, 2:5] = 1
    target = {"boxes": torch.tensor([[2.0, 1.0, 5.0, 4.0]]), "masks": mask}
    flipped = mirror(target, 10)
    x1, y1, x2, y2 = map(int, flipped["boxes"][0])
    assert flipped["masks"][0, y1:y2, x1:x2].all()
    assert flipped["masks"].sum() == 9
    assert torch.equal(mirror(flipped, 10)["boxes"], target["boxes"])


def test_mirroring_depends_on_epoch_and_index_alone(tmp_path):
    split = split_of(tmp_path, [annotation()], images=8)
    dataset = CocoDataset(split, 1, hflip=0.5, seed=3)
    keys = [(epoch, index) for epoch in range(4) for index in range(8)]
    first = [dataset[key][0] for key in keys]
    again = [dataset[key][0] for key in reversed(keys)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    plain = CocoDataset(split, 1)
    flips = [not torch.equal(dataset[key][0], plain[key][0]) for key in keys]
    assert 4 < sum(flips) < 28


def test_polygons_that_are_not_drawn_have_a_pixel(monkeypatch):
    chance = np.random.default_rng(0)
    draw, drawn = coco_masks._draw, []
    monkeypatch.setattr(coco_masks, "_draw", lambda *a: drawn.append(0) or draw(*a))
    seen = {True: 0, False: 0}
    for _ in range(300):
        angle = np.sort(chance.uniform(0, 2 * np.pi, 7))
        spread = chance.uniform(0.1, 12) * chance.uniform(0.3, 1, (7, 1))
        corners = chance.uniform(-2, 48, 2) + spread * np.stack([np.cos(angle), np.sin(angle)], 1)
        polygons, before = [corners.flatten().tolist()], len(drawn)
        covers = coco_masks.covers_a_pixel(polygons, 48, 64)
        seen[len(drawn) > before] += 1
        assert covers == (coco_masks.area(draw(polygons, 48, 64)) > 0)
    assert min(seen.values()) > 50


def test_run_lengths_are_cocos():
    chance = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.3, 1.0):
        mask = (chance.random((70, 50)) < share).astype(np.uint8)
        rle = coco_masks.to_rle({"size": [70, 50], "counts": coco_masks.run_lengths(mask)}, 70, 50)
        assert np.array_equal(coco_masks.decode(rle), mask)
        (text,) = coco_masks.encode(mask[None])
        assert coco_masks._runs(text["counts"].encode()) == coco_masks.run_lengths(mask)
        assert np.array_equal(coco_masks.decode(coco_masks.to_rle(text, 70, 50)), mask)


def test_the_demo_reads_without_a_loss(tmp_path):
    write_shapes(tmp_path, {"train": 4}, side=64)
    split = load_split(locate(tmp_path, "train"), masks=True)
    assert len(split) == 4
    assert split.report("train")[1:] == []

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
RUNS = [10 * 48 + 10, *(30, 18) * 19, 30, 8 + 34 * 48]  # of SQUARE in an image of 48 × 64


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
    assert split.image_ids == [1, 3]
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
        ({"bbox": (0.1, 0.1, 0.5, 0.3)}, "under 1 pixel, with all its numbers from 0 to 1"),
        ({"bbox": (1, 2, 3, 4, 0.5), "area": 1}, "not four numbers"),
        ({"iscrowd": "true"}, "crowd"),
        ({"iscrowd": [1]}, "crowd"),
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
        ({"segmentation": [[]]}, "no polygon"),
        ({"segmentation": [1.0, 2.0, 3.0, 4.0]}, "no polygon"),
        ({"segmentation": [[1, 1], [20, 1], [20, 20]]}, "no polygon"),
        ({"segmentation": [[1, 1, 1e5, 1, 1e5, 1e5]]}, "no polygon"),
        ({"segmentation": {"size": [48, 64], "counts": [0.5, 48 * 64 - 0.5]}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": [True, 48 * 64 - 1]}}, "run-length"),
        ({"segmentation": {"size": [48, 64]}}, "run-length"),
        ({"segmentation": {"size": 48, "counts": [48 * 64]}}, "run-length"),
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


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE[0],
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


@pytest.mark.parametrize("value", ["0", "false", "False", [0], 0.0, False, None])
def test_iscrowd_of_other_kinds_is_no_crowd(tmp_path, value):
    entry = {**annotation(), "iscrowd": value}
    assert len(split_of(tmp_path, [entry]).labels) == 1


@pytest.mark.parametrize("value", ["no", "", 2, [0, 0], [], {}, [[0]], NAN, "\x1b[31m"])
def test_iscrowd_that_says_nothing_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"annotation 5 has iscrowd .*: write 0") as error:
        split_of(tmp_path, [annotation(5, iscrowd=value)])
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iscrowd": 1}, "2 a crowd under one box; write iscrowd 0"),
        ({"bbox": (0.1, 0.1, 0.5, 0.3)}, "2 box under 1 pixel, .* in pixels"),
        ({"bbox": (1, 1, 5, 5, 0.5)}, "2 box is not four numbers; .* x, y, width, height in pix"),
        ({"segmentation": None}, "2 mask is no polygon; add polygons, or train faster_rcnn or"),
        ({"bbox": (70, 1, 5, 5)}, "2 box under 1 pixel, or outside the image; write bbox"),
    ],
)
def test_a_split_without_an_object_is_not_trained_on(tmp_path, changes, message):
    entries = [annotation(1), annotation(2, 2)]
    for entry in entries:
        entry.update(changes)
    place = locate(write_tree(tmp_path, entries, part="train"), "train")
    with pytest.raises(UserError, match=f"json: no object to train on: {message}") as error:
        load_split(place, masks=True)
    assert "\n" not in str(error.value)


def test_a_split_without_annotations(tmp_path):
    root = write_tree(tmp_path, [], part="train")
    write_tree(tmp_path, [])
    with pytest.raises(UserError, match=r"'annotations' is empty; add .* --train-annotations"):
        load_split(locate(root, "train"))
    assert len(load_split(locate(root, "val"), drop_crowds=False)) == 3
    for part in ("train", "val"):
        path = root / "annotations" / f"instances_{part}2017.json"
        content = json.loads(path.read_text())
        del content["annotations"]
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the list 'annotations' is missing"):
        load_split(locate(root, "train"))
    assert len(load_split(locate(root, "val"), drop_crowds=False)) == 3


def test_many_boxes_that_had_to_be_cut_are_said(tmp_path):
    entries = [annotation(i, 1, 1, (10, 10, 20, 30)) for i in range(1, 10)]
    entries.append(annotation(10, 2, 1, (40, 30, 60, 45)))
    assert split_of(tmp_path / "a", entries).report("train")[1:] == [
        "  ! 1 of 10 boxes reach out of their images and are cut: bbox must be x, y, width, "
        "height, not x1, y1, x2, y2"
    ]
    entries.append(annotation(11, 1))
    assert split_of(tmp_path / "b", entries).report("train")[1:] == []


def test_ids_of_any_size(tmp_path):
    root = write_tree(tmp_path, [annotation(2, 2, 7), annotation(3, 3, 1)])
    big = 2**64

    def enlarge(content):
        for entry in content["images"] + content["categories"]:
            entry["id"] += big
        for entry in content["annotations"]:
            entry["image_id"] += big
            entry["category_id"] += big

    split = load_split(edit(root, enlarge), masks=True, drop_empty=True)
    assert split.image_ids == [big + 2, big + 3]
    assert split.category_ids == [big + 1, big + 7]
    assert split.labels.tolist() == [1, 0]
    assert CocoDataset(split, 1)[(0, 1)][2] == big + 3


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
        (lambda c: c["images"][2].update(file_name="a\\b.png"), "1 of 3 .*write / there"),
        (lambda c: c["images"][2].update(file_name="http://a/b.png"), "1 of 3 .*download"),
        (lambda c: c["images"][2].update(file_name="x" * 300), r"1 of 3 .*x{119}…; name the fold"),
        (lambda c: c["images"][2].update(file_name="a\0b"), r"1 of 3 .*a\\x00b; name"),
        (lambda c: c["images"][2].update(file_name="\ud800"), r"1 of 3 .*\\ud800; name"),
        (lambda c: c["images"][2].update(file_name="../val2017/picture-3.png"), r"3.png.*'\.\.'"),
        (lambda c: c["images"][2].update(file_name="/etc/hostname"), "/etc/hostname: .*must lie"),
        (lambda c: c["images"][1].update(height=2**63), "picture-2.png: height and width say more"),
        (lambda c: c["images"][1].update(height=2**16, width=2**15), "height and width say more"),
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
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError, match=r"cannot be read as JSON .lists in lists, too deep"):
        load_split(locate(root, "val"))
    path.write_text('{"images": [], "info": ' + '{"a":' * 200_000 + "1" + "}" * 200_001)
    with pytest.raises(UserError, match=r"cannot be read as JSON .lists in lists, too deep"):
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


@pytest.mark.parametrize(
    ("segmentation", "usable"),
    [
        ({"size": [48, 64], "counts": "o" * 3_000_000}, False),  # a number that never ends
        ({"size": [48, 64], "counts": "0" * 3_000_000}, False),
        ([[float(n) for i in range(250_000) for n in (0, i % 48, 64, i % 47)]], False),
        ([[-9e5, -9e5, 9e5, -9e5, 9e5, 9e5]] * 1000, False),
        ([[x, y, x + 1, y, x + 1, y + 1] for x in range(64) for y in range(48)], True),
        ([(24 + 9 * np.exp(1j * np.linspace(0, 6.283, 1_000_000))).view(float).tolist()], True),
    ],
)
def test_masks_made_to_take_for_ever(segmentation, usable):
    """Each ends in seconds; without their bounds some would take hours, or all memory."""
    found = coco_masks.to_rle(segmentation, 48, 64)
    assert (found is not None) == usable


def test_many_parts_are_merged_as_a_few(tmp_path):
    chance = np.random.default_rng(0)
    starts = chance.uniform(0, 44, (300, 2))
    polygons = [[x, y, x + 3, y, x + 3, y + 3, x, y + 3] for x, y in starts.tolist()]
    parts = coco_masks._api().frPyObjects(polygons, 48, 64)
    assert coco_masks.to_rle(polygons, 48, 64) == coco_masks._api().merge(parts)


def test_the_demo_reads_without_a_loss(tmp_path):
    write_shapes(tmp_path, {"train": 4}, side=64)
    split = load_split(locate(tmp_path, "train"), masks=True)
    assert len(split) == 4
    assert split.report("train")[1:] == []

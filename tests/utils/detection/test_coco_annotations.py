"""Annotations and files that cannot be used: dropped one by one and said, or refused."""

import json
import re

import pytest
from helpers.coco_splits import edit, split_of
from helpers.coco_trees import annotation, write_tree

from utils.detection.coco_dataset import load_split
from utils.detection.coco_files import locate
from utils.options.detection import build_parser
from utils.recipes.detection import DetectionRecipe
from utils.system.errors import UserError

NAN = float("nan")


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

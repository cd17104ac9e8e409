"""What cannot be used of a COCO file: dropped and said, refused, or listed as a whole."""

import re

import pytest
from helpers.coco_trees import annotation, edit, split_of, write_tree

from utils.command_line.parser import parser_of
from utils.config.detection import DetectionConfig, DetectionRecipe
from utils.data.coco import check_file, locate
from utils.data.coco_dataset import load_split
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
        ({"iscrowd": True}, "crowd"),
        ({"bbox": (64, 10, 20, 30)}, "outside the image"),
        ({"bbox": (1, 2, 3, 10**400), "area": 1}, "not finite"),
        ({"iscrowd": 1}, "crowd"),
        ({"segmentation": [[1.0, 2.0, 3.0, 4.0]]}, "no polygon"),
        ({"segmentation": [[1, 1, 5, 5, 9, 9]]}, "without a pixel"),
        ({"segmentation": [[1, 1, NAN, 5, 9, 2]]}, "no polygon"),
        ({"segmentation": None}, "no polygon"),
        ({"segmentation": [[1, 1, 1e9, 5, 9, 2]]}, "no polygon"),
        ({"segmentation": [[1, 1], [20, 1], [20, 20]]}, "no polygon"),
        ({"segmentation": {"size": [48, 64], "counts": [0.5, 48 * 64 - 0.5]}}, "run-length"),
        ({"segmentation": {"size": [48, 64]}}, "run-length"),
        ({"segmentation": [[10.1, 10.1, 10.3, 10.1, 10.3, 10.3]]}, "without a pixel"),
        ({"segmentation": {"size": [48, 64], "counts": [48 * 64]}}, "without a pixel"),
        ({"segmentation": {"size": [64, 48], "counts": [1, 48 * 64 - 1]}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": [1, 2]}}, "run-length"),
        ({"segmentation": {"size": [48, 64], "counts": "\x01"}}, "run-length"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_and_said(tmp_path, changes, reason):
    bad = annotation(2, 2)
    bad.update(changes)
    split = split_of(tmp_path, [annotation(), bad])
    assert len(split.labels) == 1
    (line,) = split.report("val")[1:]
    assert line.startswith("  dropped 1 object: ")
    assert reason in line
    assert "picture-2.png" in line


def test_what_is_no_crowd(tmp_path):
    entries = [{**annotation(), "iscrowd": value} for value in (0, 0.0, False, None)]
    assert len(split_of(tmp_path, entries).labels) == 4


@pytest.mark.parametrize("value", ["no", 2, 0.5, "\x1b[31m"])
def test_iscrowd_that_says_nothing_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"annotations\[0\].iscrowd: .*; mend it") as error:
        split_of(tmp_path, [annotation(5, iscrowd=value)])
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iscrowd": 1}, "2 a crowd under one box; python -m tools.check_i"),
        ({"bbox": (0.1, 0.1, 0.5, 0.3)}, "2 box under 1 pixel, .* from 0 to 1; python"),
        ({"bbox": (1, 1, 5, 5, 0.5)}, "2 box is not four numbers; python"),
        ({"segmentation": None}, "2 mask is no polygon; mend them, or train faster_rcnn or"),
    ],
)
def test_a_split_without_an_object_is_not_trained_on(tmp_path, changes, message):
    entries = [annotation(1), annotation(2, 2)]
    for entry in entries:
        entry.update(changes)
    paths = locate(write_tree(tmp_path, entries, part="train"), "train")
    with pytest.raises(UserError, match=f"json: no object to train on: {message}") as error:
        load_split(paths, masks=True)
    assert "\n" not in str(error.value)


def test_a_split_without_annotations(tmp_path):
    root = write_tree(tmp_path, [], part="train")
    write_tree(tmp_path, [])
    with pytest.raises(UserError, match=r"'annotations' is empty; add .* --train-annotations"):
        load_split(locate(root, "train"))
    assert len(load_split(locate(root, "val"), drop_crowds=False)) == 3
    edit(root, lambda content: content.pop("annotations"))
    assert len(load_split(locate(root, "val"), drop_crowds=False)) == 3


def test_many_boxes_that_had_to_be_cut_are_said(tmp_path):
    entries = [annotation(i, 1, 1, (10, 10, 20, 30)) for i in range(1, 10)]
    entries.append(annotation(10, 2, 1, (10, 10, 60, 45)))
    assert split_of(tmp_path / "a", entries).report("train")[1:] == [
        "  ! 1 of 10 boxes reach out of their images and are cut: bbox must be x, y, width, "
        "height, not x1, y1, x2, y2"
    ]
    entries.append(annotation(11, 1))
    assert split_of(tmp_path / "b", entries).report("train")[1:] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 99}, "annotation 5: unknown image_id 99; mend it"),
        ({"category_id": 3}, "picture-1.png: annotation 5: unknown category_id 3; mend it"),
    ],
)
def test_wrong_ids_are_errors(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        split_of(tmp_path, [annotation(5, **changes)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "no COCO annotations: .* missing required field `images`"),
        (lambda c: c["images"].clear(), "the list 'images' is empty"),
        (lambda c: c["images"][1].pop("width"), r"images\[1\]: .*field `width`; mend"),
        (lambda c: c["annotations"].append(7), r"annotations\[1\]: Expected `object`, got `int`"),
        (lambda c: c["images"][1].update(id="2"), r"images\[1\].id: Expected `int`, got `str`"),
        (lambda c: c["images"][1].update(width=0), r"images\[1\].width: Expected `int` >= 1"),
        (
            lambda c: c["images"][1].update(id=1),
            "picture-2.png: id 1, which picture-1.png has, too",
        ),
        (
            lambda c: c["categories"].append(c["categories"][0]),
            "categories dog and dog have the id 7",
        ),
        (
            lambda c: c["categories"][0].update(name="cat"),
            "two categories are named cat; rename one",
        ),
        (lambda c: c["images"][2].update(file_name="gone.png"), "1 of 3 images are missing.*gone"),
        (lambda c: c["images"][2].update(file_name="x" * 300), r"1 of 3 .*x{119}…; name the fold"),
        (lambda c: c["images"][2].update(file_name="a\0b"), r"1 of 3 .*a\\x00b; name"),
        (lambda c: c["images"][2].update(file_name="../val2017/picture-3.png"), r"3.png.*'\.\.'"),
        (lambda c: c["images"][2].update(file_name="/etc/hostname"), "/etc/hostname: .*must lie"),
        (lambda c: c["images"][1].update(height=2**63), "picture-2.png: height and width say more"),
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
    parser = parser_of(DetectionConfig.parts(), DetectionRecipe(), "")
    paths = locate(write_tree(tmp_path, [], part=part), part)

    def flags_of(function, *arguments):
        with pytest.raises(UserError) as error:
            function(*arguments)
        return re.findall(r"--[\w-]+", str(error.value))

    images, annotations = [f"--{part}-images"], [f"--{part}-annotations"]
    assert {*images, *annotations} <= parser._option_string_actions.keys()
    assert flags_of(locate, tmp_path, part, "gone") == images
    assert flags_of(locate, tmp_path, part, None, "gone") == annotations
    (paths.images / "picture-2.png").unlink()
    assert flags_of(load_split, paths) == images


def faults(root):
    return check_file(locate(root, "val"))[1]


def test_a_right_file_has_no_fault(tmp_path):
    root = write_tree(tmp_path / "coco", [annotation(1), annotation(2, segmentation=None)])
    sizes, listed = check_file(locate(root, "val"))
    assert listed == []
    assert sizes == {f"picture-{n}.png": (48, 64) for n in (1, 2, 3)}


def test_all_faults_are_told_at_once(tmp_path):
    root = write_tree(
        tmp_path / "coco",
        [
            annotation(1, image_id=99),
            annotation(2, category_id=5),
            annotation(3, segmentation=[[1, 2, 3]]),
            annotation(4, iscrowd="perhaps"),
            annotation(5, bbox=(200, 0, 10, 10)),
        ],
    )

    def spoil(content):
        content["images"].append({**content["images"][0], "file_name": "picture-2.png"})
        content["images"].append({"id": 50, "height": 3})
        content["images"].append({**content["images"][0], "id": 51, "height": -1})
        content["categories"].append({**content["categories"][0], "id": 9})
        content["annotations"].append({"id": 7})
        content["annotations"][2]["bbox"] = [1, 2, 3]

    edit(root, spoil)
    where = str(root / "annotations" / "instances_val2017.json")
    first, second = (str(root / "val2017" / f"picture-{n}.png") for n in (1, 2))
    listed = faults(root)
    assert (second, "images 2 and 1 are of one file") in listed
    assert (where, "images[4]: Object missing required field `file_name`") in listed
    assert (where, "annotation 1: unknown image_id 99") in listed
    assert (first, "annotation 3: box is not four numbers") in listed
    assert (where, "annotations[5]: Object missing required field `image_id`") in listed
    assert len(listed) == 11


def test_links_out_of_the_folder_are_followed_if_asked(tmp_path):
    """One that stays inside, and a folder of images that is itself a link, are in order."""
    root = write_tree(tmp_path / "coco", [annotation()])
    images = root / "val2017"
    (images / "picture-2.png").unlink()
    (images / "picture-2.png").symlink_to(images / "picture-1.png")
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "picture-2.png").unlink()
    (tmp_path / "elsewhere" / "picture-2.png").symlink_to("picture-1.png")
    assert len(load_split(locate(root, "val"))) == 3
    outside = tmp_path / "outside"
    outside.mkdir()
    (images / "picture-3.png").rename(outside / "picture-3.png")
    (images / "picture-3.png").symlink_to(outside / "picture-3.png")
    with pytest.raises(UserError, match=r"picture-3\.png is a link to .*--images-anywhere"):
        load_split(locate(root, "val"))
    assert len(load_split(locate(root, "val", anywhere=True))) == 3
    (images / "picture-3.png").unlink()
    (images / "sub").symlink_to(outside)
    edit(root, lambda content: content["images"][2].update(file_name="sub/picture-3.png"))
    with pytest.raises(UserError, match=r"sub/picture-3\.png is a link to"):
        load_split(locate(root, "val"))
    edit(root, lambda c: c["images"][2].update(file_name="../outside/picture-3.png"))
    with pytest.raises(UserError, match="must lie in the folder"):
        load_split(locate(root, "val", anywhere=False))
    edit(root, lambda c: c["images"][2].update(file_name=str(outside / "picture-3.png")))
    assert len(load_split(locate(root, "val", anywhere=True))) == 3

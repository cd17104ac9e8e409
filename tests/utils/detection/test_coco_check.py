"""Every fault of a COCO file is told, not the first alone; links may leave the folder if asked."""

import json

import pytest
from helpers.coco_trees import annotation, write_tree

from utils.detection.coco_check import AnnotationCheck
from utils.detection.coco_dataset import load_split
from utils.detection.coco_files import locate
from utils.detection.coco_truth import JudgedObjects
from utils.system.errors import UserError


def change(root, edit):
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def faults(root):
    return AnnotationCheck(locate(root, "val")).faults


def test_a_right_file_has_no_fault(tmp_path):
    root = write_tree(tmp_path / "coco", [annotation(1), annotation(2, segmentation=None)])
    checked = AnnotationCheck(locate(root, "val"))
    assert checked.faults == []
    assert checked.sizes == {f"picture-{n}.png": (48, 64) for n in (1, 2, 3)}


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

    def edit(content):
        content["images"].append({**content["images"][0], "file_name": "picture-2.png"})
        content["images"].append({"id": 50, "height": 3})
        content["images"].append({**content["images"][0], "id": 51, "height": -1})
        content["categories"].append({**content["categories"][0], "id": 9})
        content["annotations"].append({"id": 7})
        content["annotations"][2]["bbox"] = [1, 2, 3]

    change(root, edit)
    where = str(root / "annotations" / "instances_val2017.json")
    first, second = (str(root / "val2017" / f"picture-{n}.png") for n in (1, 2))
    found = faults(root)
    assert (second, "id 1, which picture-1.png has, too") in found
    assert (second, "images 2 and 1 are of one file") in found
    assert (where, "images[4] has no 'file_name'") in found
    assert any(reason.endswith("must be whole numbers of pixels") for _, reason in found)
    assert any(reason.startswith("two categories are named ") for _, reason in found)
    assert (where, "annotation 1 has the unknown image_id 99") in found
    assert (first, "annotation 2: unknown category_id 5") in found
    assert (first, "annotation 3: box is not four numbers") in found
    assert (first, "annotation 3: mask is no polygon") in found
    assert (first, "annotation 4: iscrowd 'perhaps', not 0 or 1") in found
    assert (first, "annotation 5: box under 1 pixel, or outside the image") in found
    assert (where, "annotations[5] has no 'image_id'") in found
    assert len(found) == 12


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
    change(root, lambda content: content["images"][2].update(file_name="sub/picture-3.png"))
    with pytest.raises(UserError, match=r"sub/picture-3\.png is a link to"):
        load_split(locate(root, "val"))
    change(root, lambda c: c["images"][2].update(file_name="../outside/picture-3.png"))
    with pytest.raises(UserError, match="must lie in the folder"):
        load_split(locate(root, "val", anywhere=False))
    change(root, lambda c: c["images"][2].update(file_name=str(outside / "picture-3.png")))
    assert len(load_split(locate(root, "val", anywhere=True))) == 3


@pytest.mark.parametrize(("objects", "said"), [(100, False), (101, True)])
def test_more_objects_than_coco_counts_detections_are_said(tmp_path, objects, said):
    root = write_tree(tmp_path / "coco", [annotation(n) for n in range(1, objects + 1)])
    lines = JudgedObjects(locate(root, "val"), masks=False).report("val")
    assert any("1 images have more than 100 objects" in line for line in lines) is said

"""The demo's COCO tree: exact masks, the same files every time, whole or absent."""

import filecmp
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from utils.data import coco_masks, demo_shapes
from utils.system.errors import UserError

COUNTS = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    demo_shapes.write_shapes(folder, COUNTS, side=64)
    return folder


def read(tree, part):
    return json.loads((tree / "annotations" / f"instances_{part}2017.json").read_text())


def test_masks_are_exact(tree):
    """In a mask every pixel has the one colour of its digit; box and area are the mask's."""
    for annotation in read(tree, "train")["annotations"]:
        mask = coco_masks.decode(coco_masks.to_rle(annotation["segmentation"], 64, 64)).astype(bool)
        name = f"{annotation['image_id']:06d}.png"
        with Image.open(tree / "train2017" / name) as picture:
            pixels = np.asarray(picture)
        assert len(np.unique(pixels[mask], axis=0)) == 1
        assert mask.sum() == annotation["area"]
        x, y, w, h = annotation["bbox"]
        inside = mask[y : y + h, x : x + w]
        assert inside.sum() == mask.sum()
        assert inside.any(0)[[0, -1]].all()
        assert inside.any(1)[[0, -1]].all()


def test_masks_do_not_overlap(tree):
    content = read(tree, "train")
    for image in content["images"]:
        masks = [
            coco_masks.decode(coco_masks.to_rle(a["segmentation"], 64, 64))
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        assert np.sum(masks, axis=0).max() == 1


def test_the_same_files_every_time(tree, tmp_path):
    demo_shapes.write_shapes(tmp_path, COUNTS, side=64)
    for part in COUNTS:
        names = [image["file_name"] for image in read(tree, part)["images"]]
        folders = (tree / f"{part}2017", tmp_path / f"{part}2017")
        assert filecmp.cmpfiles(*folders, names, shallow=False)[0] == names
        assert read(tree, part) == read(tmp_path, part)


def test_a_digit_that_would_hide_another_is_left_out():
    full = np.ones((8, 8))
    photo = np.full((40, 40, 3), 200, dtype=np.uint8)
    chance = np.random.default_rng(0)
    _, objects = demo_shapes.compose([(full, 3), (full, 5)], [photo], 28, chance)
    assert [label for _, label in objects] == [3]


def test_written_once_and_whole(tmp_path, monkeypatch):
    def write(folder):
        (folder / "file").write_text("x")
        calls.append(folder)
        if fail:
            raise OSError("no room")

    calls, fail = [], True
    monkeypatch.setattr(demo_shapes, "write_shapes", write)
    with pytest.raises(UserError, match=r"cannot write there \(no room\); make room"):
        demo_shapes.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
    fail = False
    folder = demo_shapes.prepare(tmp_path)
    assert demo_shapes.prepare(tmp_path) == folder == tmp_path / "shapes"
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]
    shutil.rmtree(folder)

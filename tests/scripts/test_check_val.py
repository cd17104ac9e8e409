"""--check-val of both training scripts, and tools.check_images --split on every kind of data."""

import csv
import shutil
from pathlib import Path

import pytest
from helpers.coco_trees import NETWORK, annotation, write_tree
from helpers.shard_sets import make
from helpers.small_runs import SMALL

from tools import check_images
from utils.system.errors import EXIT_FAILED, UserError

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def checked(call):
    """tools.check_images: exit code, paths that it lists, its last line on stderr."""

    def start(*arguments: object) -> tuple[int, list[str], str]:
        code, out, err = call(*arguments, "-j", 1, entry=check_images.main)
        return code, [row[0] for row in csv.reader(out[1:])], err[-1]

    return start


def test_a_classifier_begins_no_epoch_and_makes_no_folder(call, tree, tmp_path):
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    code, out, _ = call(*SMALL, "--epochs", 1, "--check-val", "--output", "good", data)
    assert code == 0
    assert "check: 15 validation images can be read" in out
    broken = data / "val" / "b" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    code, out, err = call(*SMALL, "--epochs", 1, "--check-val", "--output", "bad", data)
    assert code == EXIT_FAILED
    assert len(err) == 1
    assert err[0].startswith(f"error: {broken}: ")
    assert not any(line.startswith("epoch") for line in out)
    assert not (tmp_path / "bad").exists()


def test_a_detector_begins_no_epoch_and_makes_no_folder(detect, shapes, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    flags = (*NETWORK, "--batch-size", 4, "--warmup-steps", 2, "--epochs", 1, "--check-val")
    assert "check: 5 validation images can be read" in detect(*flags, "--output", "good", data)
    broken = sorted((data / "val2017").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError) as error:
        detect(*flags, "--output", "bad", data)
    assert str(error.value).startswith(f"{broken}: ")
    assert error.value.exit_code == EXIT_FAILED
    assert not (tmp_path / "bad").exists()


def test_one_part_of_shards(checked, tree, tmp_path, monkeypatch):
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    (data / "train" / "a" / "1.png").write_bytes(b"no image")
    shards = make(monkeypatch, data, tmp_path / "shards")
    code, paths, said = checked(shards, "--split", "val")
    assert (code, paths, said) == (0, [], "15 images read, 0 broken")
    code, paths, said = checked(shards, "--split", "train")
    assert (code, said) == (1, "24 images read, 1 broken")
    assert paths[0].endswith("a/1.png")


def test_one_part_of_coco_with_its_annotations_alone(checked, tmp_path):
    data = write_tree(tmp_path / "coco", [annotation()], images=2)
    write_tree(data, [annotation(1, image_id=9)], images=3, part="train")
    code, paths, said = checked(data, "--split", "val")
    assert (code, paths, said) == (0, [], "2 images read, 0 broken")
    code, paths, said = checked(data, "--split", "train")
    assert (code, said) == (1, "3 images read, 1 broken")
    assert paths == [str(data / "annotations" / "instances_train2017.json")]


def test_a_part_that_is_not_there_is_one_line(checked, tree):
    code, paths, said = checked(tree / "val", "--split", "train")
    assert (code, paths) == (2, [])
    assert said == (
        f"error: {tree}/val: no folder train or train2017 in it; leave out --split train, or give "
        "the folder that holds it"
    )

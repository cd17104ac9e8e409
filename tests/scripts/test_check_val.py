"""--check-val of both training scripts, and tools.check_images --split on every kind of data."""

import csv
import shutil
import sys
import threading
from pathlib import Path

import pytest
from helpers.coco_trees import NETWORK, annotation, write_tree
from helpers.kill_driver import same, state
from helpers.shard_sets import make
from helpers.small_runs import SMALL, place
from helpers.trees import write_tree as write_image_tree

from tools import check_images
from utils.options import parser
from utils.system.errors import EXIT_FAILED, UserError
from utils.training.state import RunState


@pytest.fixture
def checked(monkeypatch, capfd):
    """tools.check_images: exit code, paths that it lists, its last line on stderr."""
    monkeypatch.setattr(parser, "end_children", lambda: True)

    def start(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["check_images", *map(str, arguments), "-j", "1"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            parser.run_script(check_images.main)
        out, err = capfd.readouterr()
        return ended.value.code, [row[0] for row in csv.reader(out.splitlines()[1:])], err.strip()

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


@pytest.fixture
def check_ends_in_the_first_step(monkeypatch):
    """A step that lasts until the background has read all of validation, or met with a fault."""
    finish_step = RunState.finish_step

    def slowly(state: RunState, broken: list[int]) -> None:
        finish_step(state, broken)
        for thread in threading.enumerate():
            if thread.name == "check-val":
                thread.join()

    monkeypatch.setattr(RunState, "finish_step", slowly)


@pytest.mark.usefixtures("check_ends_in_the_first_step")
def test_a_fault_found_beside_the_training_costs_no_step(call, tree, tmp_path):
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    flags = (*SMALL, "--epochs", 2)
    assert call(*flags, "--output", "through", data)[0] == 0
    broken = data / "val" / "b" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    code, out, err = call(*flags, "--output", "run", data)
    assert code == EXIT_FAILED
    assert len(err) == 1
    assert err[0].startswith(f"error: {broken}: ")
    assert "stopped by a fault: saved in epoch 1 after step 1; go on with" in out
    assert place(tmp_path / "run") == (0, 1)
    broken.write_bytes(whole)
    assert call("--resume", "auto", *flags, "--output", "run", data)[0] == 0
    assert same(state(tmp_path / "run"), state(tmp_path / "through"))


def test_a_fault_that_one_rank_of_two_has_found(start, tmp_path):
    data = write_image_tree(tmp_path / "data", train=100)  # of each class: the first epoch is long
    broken = data / "val" / "b" / "2.png"  # the eighth, so rank 1 reads it
    broken.write_bytes(broken.read_bytes()[:60])
    code, out, err = start(*SMALL, "--epochs", 2, "--output", "run", data, ranks=2).end()
    assert code == EXIT_FAILED
    [told] = [line for line in out if "saved in epoch" in line]
    epoch, step = place(tmp_path / "run")
    assert told == f"stopped by a fault: saved in epoch {epoch + 1} after step {step}; go on with"
    assert epoch == 0
    [named] = [line for line in err if line.startswith("error")]
    assert named.startswith(f"error (rank 1): {broken}: ")
    assert not any("exitcode: 143" in line for line in err)


@pytest.mark.usefixtures("check_ends_in_the_first_step")
def test_a_fault_found_beside_a_detector_s_training_costs_no_step(detect, shapes, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    broken = sorted((data / "val2017").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:60])
    flags = (*NETWORK, "--batch-size", 4, "--warmup-steps", 2, "--epochs", 1)
    with pytest.raises(UserError) as error:
        detect(*flags, "--output", "run", data)
    assert str(error.value).startswith(f"{broken}: ")
    assert error.value.exit_code == EXIT_FAILED
    assert place(tmp_path / "run") == (0, 1)


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

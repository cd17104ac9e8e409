"""main.py and detect_main.py: what is on disk, and what is said, before the first epoch ends."""

import json
import sys

import pytest
import torch
from helpers.coco_trees import NETWORK
from helpers.cut_runs import Killed
from helpers.kill_driver import same
from helpers.small_runs import SMALL, place
from helpers.trees import write_tree

import light_main
import main as script
from utils.runs import checkpoint
from utils.system.errors import EXIT_STOPPED

pytestmark = pytest.mark.usefixtures("thin")


def kill(*_):
    raise Killed


def test_a_run_that_is_killed_in_its_first_step_comes_back_as_itself(
    call, tree, tmp_path, monkeypatch
):
    """Network, batch, recipe and seed are the killed run's, though no flag names them again."""
    flags = (*SMALL, "--seed", 7, "--epochs", 1, tree, "--output")
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_one_epoch", kill)
        patch.setattr(sys, "argv", ["main.py", *map(str, flags), "cut"])
        with pytest.raises(Killed):
            script.main()
    assert place(tmp_path / "cut") == (0, 0)
    assert (tmp_path / "cut" / "args.json").exists()
    code, out, err = call("--resume", "auto", "--output", "cut")
    assert (code, err) == (0, [])
    assert "resuming cut/last.pth" in out
    call(*flags, "through")
    cut, through = (checkpoint.load(tmp_path / name / "last.pth") for name in ("cut", "through"))
    assert cut["seed"] == 7
    assert same(cut["state_dict"], through["state_dict"])
    assert cut["history"] == through["history"]


def test_a_folder_that_was_made_and_no_more_is_begun_in(call, tree, tmp_path):
    """Killed between the lock and the first checkpoint: nothing is known of the run yet."""
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / ".lock").touch()
    code, out, _ = call(*SMALL, "--epochs", 1, "--resume", "auto", "--output", "cut", tree)
    assert code == 0
    assert out[0] == "no checkpoint in cut yet: starting from the beginning"
    assert json.loads((tmp_path / "cut" / "args.json").read_text())["seed"] == 1


def test_a_detector_that_is_stopped_at_once_comes_back(detect, shapes, tmp_path, monkeypatch):
    import detect_main

    flags = (*NETWORK, "-a", "retinanet", "--batch-size", 4, "--warmup-steps", 2, "--epochs", 1)
    with monkeypatch.context() as patch:  # as killed before the first step
        patch.setattr(detect_main, "train_one_epoch", lambda *_: False)
        detect(*flags, "--seed", 3, "--output", "cut", shapes, code=EXIT_STOPPED)
    assert place(tmp_path / "cut") == (0, 0)
    lines = detect("--resume", "auto", "--output", "cut")
    assert lines[0] == "resuming cut/last.pth"
    saved = checkpoint.load(tmp_path / "cut" / "last.pth")
    assert (saved["arch"], saved["seed"], saved["progress"]["epoch"]) == ("retinanet", 3, 1)


def test_another_number_of_threads_is_said(call, run_folder, monkeypatch):
    """The bits of a sum depend on it; `--seed` promises the same bits for the same threads."""
    _, out, _ = call("--resume", run_folder / "last.pth", "--epochs", 3)
    assert not any("the run was computed by" in line for line in out)
    assert not any("training images have other names" in line for line in out)
    held = json.loads((run_folder / "args.json").read_text())["environment"]["cpu_threads"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: held + 1)
    _, out, _ = call("--resume", run_folder / "last.pth", "--epochs", 4)
    threads = "1 thread" if held == 1 else f"{held} threads"
    line = f"! the run was computed by {threads}, and goes on with {held + 1}: sums are "
    assert any(text.startswith(line) and f"OMP_NUM_THREADS={held}" in text for text in out)


def test_data_that_changed_between_two_epochs_is_said(call, run_folder, tmp_path):
    other = write_tree(tmp_path / "other", train=9)
    code, out, _ = call("--resume", run_folder / "last.pth", "--epochs", 3, other)
    assert code == 0
    assert any(line.startswith("! the training images have other names or labels") for line in out)


def test_the_other_family_s_numbers_are_said(call, tree, monkeypatch):
    """Each script's default recipe is the paper's for one family of networks."""
    monkeypatch.setattr(script, "train_one_epoch", lambda *_: False)  # it is said before
    small = ("--img-size", 32, "-b", 6, "-j", 0, "--epochs", 1, tree)
    entry = lambda: script.main(light_main.RECIPE, light_main.DEMOS)  # noqa: E731
    _, out, _ = call("-a", "resnet18", *small, entry=entry)
    assert (
        "! resnet18 trains by the paper's numbers for MobileNetV2; those for ResNets come with "
        "main.py"
    ) in out
    _, out, _ = call("-a", "mobilenetv2", *small)
    assert any(line.endswith("those for MobileNetV2 come with light_main.py") for line in out)
    _, out, _ = call("-a", "mobilenetv2", *small, entry=entry)
    assert not any("numbers for" in line for line in out)


def test_a_warm_up_longer_than_the_run_is_said(call, tree):
    _, out, _ = call(*SMALL, "--epochs", 1, "--warmup-epochs", 3, tree)
    assert any(line.startswith("! the warm-up takes 3 epochs and the run has 1") for line in out)


def test_a_detector_s_warm_up_longer_than_the_run_is_said(detect, shapes, tmp_path):
    flags = (*NETWORK, "-a", "retinanet", "--batch-size", 4, "--epochs", 1)
    lines = detect(*flags, "--warmup-steps", 4, "--output", "run", shapes)  # of three steps
    assert any(line.startswith("! the warm-up takes 4 steps and the run has 3") for line in lines)
    (row,) = checkpoint.load(tmp_path / "run" / "last.pth")["history"]
    assert row["lr"] == pytest.approx(0.005 * (1 - 2 / 3 * (1 - 2 / 4)))  # of the third


def test_a_detector_begins_from_one_of_other_classes(detect, shapes, tmp_path):
    flags = ("--min-size", 64, "--max-size", 64, "-j", 0, "--batch-size", 4, "--warmup-steps", 2)
    flags += ("--epochs", 1, "--seed", 1)
    detect(*NETWORK, "-a", "retinanet", *flags, "--output", "one", shapes)
    annotations = shapes / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text())
    others = tmp_path / "others.json"
    for entry in content["categories"]:
        entry["name"] = f"new {entry['name']}"
    others.write_text(json.dumps(content))
    vals = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    vals["categories"] = content["categories"]
    (tmp_path / "val.json").write_text(json.dumps(vals))
    named = ("--train-annotations", others, "--val-annotations", tmp_path / "val.json")
    lines = detect("--detector-weights", "one/best.pth", *named, *flags, "--output", "two", shapes)
    assert any("of the class layers fresh" in line for line in lines)
    saved = checkpoint.load(tmp_path / "two" / "last.pth")
    assert saved["arch"] == "retinanet"
    assert saved["model_kwargs"]["norm"] == "eval"
    assert all(name.startswith("new ") for name in saved["classes"])
    assert "detector_weights" not in saved["args"]

"""Ways to train that are off by default: runs, resumptions bit for bit, refusals in one line."""

import json
from pathlib import Path

import pytest
from helpers.cut_runs import cut_twice, same
from helpers.trees import write_tree

from utils.data.image_folder import scan
from utils.runs import checkpoint

SMALL = ("-a", "eca_resnet18", "--img-size", 32, "-b", 8, "--lr", 0.01, "-j", 0, "--seed", 1)


@pytest.mark.parametrize("network", ["eca_resnet18", "eca_mobilenetv2"])
def test_gradient_checkpointing_changes_no_bit(call, tree, tmp_path, monkeypatch, network):
    """MobileNetV2 has dropout, whose chance is the same in the second pass."""
    flags = (*SMALL, "-a", network, tree)
    saved = cut_twice(call, tmp_path, monkeypatch, *flags, "--grad-checkpointing")
    assert saved["args"]["grad_checkpointing"]
    code, out, _ = call(*flags, "--epochs", 2, "--output", "plain")
    assert code == 0
    assert not any("gradient checkpointing" in line for line in out)
    plain = checkpoint.load(tmp_path / "plain" / "last.pth")
    assert same(plain["state_dict"], saved["state_dict"])
    assert same(plain["optimizer"], saved["optimizer"])
    # A memory that has grown: the run goes on without it.
    last = tmp_path / "plain" / "last.pth"
    code, out, _ = call("--resume", last, "--epochs", 3, "--grad-checkpointing")
    assert code == 0
    assert "  gradient checkpointing: backward computes each block again" in out


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training images: 12, 8 and 4 of the classes. Read only."""
    root = write_tree(tmp_path_factory.mktemp("uneven"), train=12, val=2)
    for name, kept in (("b", 8), ("c", 4)):
        for path in sorted((root / "train" / name).iterdir())[kept:]:
            path.unlink()
    return root


def test_class_weights_and_a_balanced_order_are_taken_up(call, uneven, tmp_path, monkeypatch):
    flags = (*SMALL, "--class-weights", "balanced", "--sampler", "balanced", "--repeats", 2)
    flags += ("--accumulate", 2, "--mixup", 0.2, "--label-smoothing", 0.1)
    saved = cut_twice(call, tmp_path, monkeypatch, *flags, uneven)
    assert saved["class_weights"] == pytest.approx([2 / 3, 1.0, 2.0])
    assert saved["recipe"]["sampler"] == "balanced"
    args = json.loads((tmp_path / "through" / "args.json").read_text())
    assert args["class_weights"] == saved["class_weights"]
    assert args["args"]["class_weights"] == "balanced"
    # What the weights came from may change: the run keeps its own.
    grown = write_tree(tmp_path / "grown")
    last = tmp_path / "through" / "last.pth"
    assert scan(str(grown / "train")).classes == tuple(saved["classes"])
    code, out, err = call("--resume", last, "--epochs", 3, grown)
    assert (code, err) == (0, [])
    assert "class weights of the loss: 0.6667 (a) to 2 (c)" in out
    assert checkpoint.load(last)["class_weights"] == saved["class_weights"]


def test_class_weights_of_a_file_are_the_run_s_own(call, uneven, tmp_path):
    weights = tmp_path / "weights.csv"
    weights.write_text("class,weight\nb,2\na,0.5\nc,8\n")
    flags = (*SMALL, "--epochs", 1, "--class-weights", weights, "--output", "run")
    code, out, err = call(*flags, uneven)
    assert (code, err) == (0, [])
    assert "class weights of the loss: 0.5 (a) to 8 (c)" in out
    last = tmp_path / "run" / "last.pth"
    assert checkpoint.load(last)["class_weights"] == [0.5, 2.0, 8.0]
    assert call("--resume", "auto", *flags, uneven)[0] == 0  # the same command once more
    weights.write_text("b,2\na,0.5\nc,9\n")
    for given, said in ((weights, "holds other weights than"), ("balanced", "leave --class-weig")):
        code, _, err = call("--resume", last, "--epochs", 2, "--class-weights", given)
        assert code == 2
        assert len(err) == 1
        assert said in err[0]
    weights.unlink()
    assert call("--resume", last, "--epochs", 2)[0] == 0
    assert checkpoint.load(last)["class_weights"] == [0.5, 2.0, 8.0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--class-weights", "none.csv"), "none.csv: No such file or directory; give balanced,"),
        (("--sampler", "even"), "invalid choice: 'even'"),
        (("-e", "--resume", "x", "--class-weights", "balanced"), "--class-weights does nothing"),
    ],
)
def test_bad_values_are_answered_in_one_line(call, tree, tmp_path, flags, said):
    code, _, err = call(*SMALL, *flags, tree)
    assert code == 2
    assert len(err) == 1
    assert said in err[0]
    assert not (tmp_path / "runs").exists()


def test_what_a_resumption_cannot_take_up_is_refused(call, run_folder):
    last = run_folder / "last.pth"
    saved = checkpoint.load(last)
    saved["progress"].update(epoch=1, step=2)
    for change, flags, said in (
        ({}, ("--sampler", "balanced"), "inside an epoch of the sampler shuffle: leave --sampler"),
        ({}, ("--class-weights", "balanced"), "the run's class weights are none: leave --class-"),
        ({"class_weights": [1.0]}, (), "holds 1 class weights for 3 classes"),
        ({"class_weights": [1.0, "2", 1.0]}, (), "the field class_weights cannot be used (a list"),
    ):
        checkpoint.save(last, {**saved, **change})
        code, _, err = call("--resume", last, *flags)
        assert code == 2
        assert len(err) == 1
        assert said in err[0]

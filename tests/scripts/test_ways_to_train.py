"""Ways to train that are off by default: runs, resumptions bit for bit, refusals in one line."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.cut_runs import cut_twice
from helpers.kill_driver import same
from helpers.trees import write_tree

import main as script
from main import RECIPE
from tools.compare_runs import read_run
from utils.command_line.classification import notes_on
from utils.data.image_folder import scan
from utils.runs import checkpoint
from utils.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("thin")

SMALL = ("-a", "eca_resnet18", "--img-size", 32, "-b", 8, "--lr", 0.01, "-j", 0, "--seed", 1)


@pytest.mark.parametrize("arch", ["eca_resnet18", "eca_mobilenetv2"])
def test_gradient_checkpointing_changes_no_bit(call, tree, tmp_path, arch):
    """Stochastic depth leaves out the same blocks both times. It may be taken up on the way."""
    flags = (*SMALL, "-a", arch, "--drop-path", 0.5, tree)
    for name, more in (("plain", ()), ("again", ("--grad-checkpointing",))):
        assert call(*flags, "--epochs", 1, *more, "--output", name)[0] == 0
    plain, again = (checkpoint.load(tmp_path / name / "last.pth") for name in ("plain", "again"))
    assert again["args"]["grad_checkpointing"]
    assert same(plain["state_dict"], again["state_dict"])
    assert same(plain["optimizer"], again["optimizer"])
    last = tmp_path / "plain" / "last.pth"
    code, out, _ = call("--resume", last, "--epochs", 2, "--grad-checkpointing")
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
    assert any("balanced correct the same thing twice: use one of them" in line for line in out)
    assert checkpoint.load(last)["class_weights"] == saved["class_weights"]


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_outputs_without_a_class_weigh_as_they_do_without_weights(call, tree, tmp_path, loss):
    """Weights of 1 for the data's classes, and more outputs than classes: the run without any."""
    weights = tmp_path / "ones.csv"
    weights.write_text("a,1\nb,1\nc,1\n")
    flags = (*SMALL, "--epochs", 1, "--num-classes", 5, "--label-smoothing", 0.2, "--loss", loss)
    for output, more in (("plain", ()), ("ones", ("--class-weights", weights))):
        code, _, err = call(*flags, *more, "--output", output, tree)
        assert (code, err) == (0, [])
    plain, ones = (checkpoint.load(tmp_path / n / "last.pth") for n in ("plain", "ones"))
    assert ones["class_weights"] == [1.0, 1.0, 1.0]
    rows = plain["history"][0], ones["history"][0]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-5)
    for name, value in plain["state_dict"].items():
        assert torch.allclose(ones["state_dict"][name], value, rtol=1e-3, atol=1e-4), name


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


def test_what_is_frozen_stays_as_it_was(call, two_epochs, tree, tmp_path, monkeypatch):
    """Weights and running statistics, also of the average, bit for bit, through kills."""
    weights, frozen = two_epochs / "last.pth", tuple(f"features.{i}." for i in range(7))
    flags = (*SMALL, "-a", "mobilenetv2", "--pretrained", weights, "--freeze", "stages:3")
    flags += ("--ema", 0.9, "--layer-decay", 0.5, "--optimizer", "adamw", "--drop-path", 0.3)
    saved = cut_twice(call, tmp_path, monkeypatch, *flags, tree)
    before = checkpoint.load(weights)["state_dict"]
    for states in (saved["state_dict"], saved["raw_state_dict"]):
        for name, value in states.items():
            changed = not torch.equal(value, before[name])
            assert changed != name.startswith(frozen), name
    code, out, _ = call("--resume", "through/last.pth", "--epochs", 3)
    assert code == 0
    (line,) = (line for line in out if line.startswith("network:"))
    trained = sum(v.numel() for s in saved["optimizer"]["state"].values() for v in [s["exp_avg"]])
    assert line.endswith(f"; features.0 to features.6 frozen, {trained:,} parameters train")
    assert any("layer decay 0.5" in line for line in out)
    assert not any("momentum" in line for line in out)


def test_a_recipe_that_is_hardly_meant_is_warned_of():
    for changed, said in (
        ({}, ()),
        ({"optimizer": "lamb", "lr": 5e-3}, ()),
        ({"optimizer": "adamw", "lr": 9e-3}, ()),
        ({"optimizer": "adamw", "lr": 1e-2}, ("! a learning rate of 0.01 is one for SGD: for ad",)),
        ({"epochs": 31}, ()),
        (
            {"epochs": 30},
            ("! the learning rate falls every 30 epochs and the run has 30: it never falls",),
        ),
        ({"epochs": 30, "schedule": "cosine"}, ()),
        (
            {"optimizer": "adamw"},
            ("! a learning rate of 0.1 is one for SGD: for adamw rates near ",),
        ),
    ):
        notes = notes_on(RECIPE.override(**changed), RECIPE, True)
        assert len(notes) == len(said)
        assert all(note.startswith(word) for note, word in zip(notes, said, strict=True))


def test_what_needs_timm_says_so_in_one_line(call, tree, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "timm" else find(name)
    )
    code, _, err = call(*SMALL, "--optimizer", "lamb", tree)
    assert code == 2
    assert err == ["error: --optimizer lamb needs timm: pip install timm"]
    code, _, err = call(*SMALL, "--auto-augment", "rand-m7-mstd0.5-inc1", tree)
    assert code == 2
    assert err == ["error: --auto-augment rand-m7-mstd0.5-inc1 needs timm: pip install timm"]
    assert not (tmp_path / "runs").exists()


def test_training_ends_without_a_better_top_1(call, tree, tmp_path, monkeypatch):
    """By the history in the checkpoint: a run that is stopped on its way ends at the same epoch."""
    judged: list[float] = []

    def judge(*_) -> dict[str, float]:
        return {"loss": 1.0, "top1": judged.pop(0), "top5": 100.0, "images": 15}

    monkeypatch.setattr(script.classification, "evaluate", judge)
    flags = (*SMALL, "-b", 24, "--epochs", 9, "--early-stop", 3, tree)
    judged[:] = [50.0, 60.0, 60.0, 55.0, 60.0, 99.0]
    code, out, err = call(*flags, "--output", "through")
    assert (code, err, judged) == (0, [], [99.0])
    said = "stopped early, after 5 of 9 epochs: 3 without a better top-1; to go on, give more with "
    said += "--early-stop, or 0 for all epochs"
    (at,) = (i for i, line in enumerate(out) if line == said)
    assert out[at + 1] == "done: best top-1 60.00 % (epoch 2)"
    assert out[-1].endswith("--resume through/last.pth --early-stop 0")

    judged[:] = [50.0, 60.0, 60.0, 55.0, 60.0, 99.0]
    finish_epoch, ended = TrainingState.finish_epoch, []

    def stop(state, *rest):
        if len(ended) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        ended.append(state.epoch)
        return finish_epoch(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "finish_epoch", stop)
        assert call(*flags, "--output", "cut")[0] == 143
        assert call(*flags, "--output", "cut", "--resume", "auto")[0] == 0
    assert ended == [0, 1, 2, 3, 4]
    one, other = (checkpoint.load(tmp_path / name / "last.pth") for name in ("through", "cut"))
    assert same(one["state_dict"], other["state_dict"])
    assert same(one["history"], other["history"])

    # A scheduler that starts it once more learns that it is done; more patience goes on.
    code, out, err = call(*flags, "--output", "cut", "--resume", "auto")
    assert (code, err, out[-1]) == (0, [], said)
    assert call("--resume", "cut/last.pth", "--early-stop", 4, "--epochs", 6)[0] == 0
    assert [row["val_top1"] for row in checkpoint.load("cut/last.pth")["history"]][-1] == 99.0


def test_some_epochs_are_evaluated_and_another_figure_decides(call, tree, tmp_path):
    flags = (*SMALL, "--epochs", 3, tree)
    code, out, err = call(*flags, "--eval-every", 2, "--best-by", "recall", "--output", "some")
    assert (code, err) == (0, [])
    first, *others = (line for line in out if line.startswith("epoch ") and "train loss" in line)
    assert " val " not in first
    assert all(" val loss " in line and " recall " in line for line in others)
    assert call(*flags, "--output", "each")[0] == 0
    some, each = (checkpoint.load(tmp_path / name / "last.pth") for name in ("some", "each"))
    assert same(some["state_dict"], each["state_dict"])
    columns = {"val_loss", "val_top1", "val_top5"}
    assert [columns & row.keys() for row in some["history"]] == [set(), columns, columns]
    for mine, theirs in zip(some["history"][1:], each["history"][1:], strict=True):
        assert mine == theirs | {"val_recall": mine["val_recall"]}  # classes of equal size here
        assert mine["val_recall"] == pytest.approx(mine["val_top1"])
    run = read_run(tmp_path / "some")
    assert run.best["epoch"] == some["progress"]["best"]["epoch"] + 1 >= 2
    assert (tmp_path / "some" / "metrics.csv").read_text().splitlines()[1].endswith(",,,,")
    # The best so far was chosen by its recall.
    said = "the run trains with --best-by recall: leave --best-by loss out"
    assert said in call("--resume", "some/last.pth", "--best-by", "loss", "--epochs", 4)[2][0]
    code, out, _ = call("--resume", "some/last.pth", "--epochs", 4)
    assert code == 0
    assert "going on with some/last.pth in epoch 4" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--class-weights", "none.csv"), "none.csv: No such file or directory; give balanced,"),
        (("--freeze", "stages:5"), "--freeze: eca_resnet18 has 4 stages: 'stages:5' are more; use"),
        (
            ("--optimizer", "adamw", "--momentum", 0.8),
            "--momentum does nothing with --optimizer adamw: leave it out",
        ),
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
        ({}, ("--sampler", "balanced"), "batches with --sampler shuffle: leave --sampler balanced"),
        ({}, ("--class-weights", "balanced"), "the run's class weights are none: leave --class-"),
        ({}, ("--optimizer", "lamb"), "trains with --optimizer sgd: leave --optimizer lamb out"),
        ({}, ("--freeze", "backbone"), "trains with --freeze none: leave --freeze backbone out"),
        ({}, ("--layer-decay", 0.5), "with --layer-decay 1: leave --layer-decay 0.5 out"),
        ({"class_weights": [1.0]}, (), "holds 1 class weights for 3 classes"),
        ({"class_weights": [1.0, "2", 1.0]}, (), "the field class_weights[1] cannot be used"),
    ):
        checkpoint.save(last, {**saved, **change})
        code, _, err = call("--resume", last, *flags)
        assert code == 2
        assert len(err) == 1
        assert said in err[0]

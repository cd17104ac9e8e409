"""detect_main.py: a run's life, resumption bit for bit, two ranks."""

import csv
import json
import signal
import subprocess
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.coco_trees import DIGITS, NETWORK
from helpers.documents import blocks, pattern
from PIL import Image

import detect_main
from models import create_model
from models.detection.detectors import DETECTORS, create_detector
from utils.data import demo_shapes
from utils.data.coco_eval import FIGURES, Summary
from utils.data.demo_shapes import write_shapes
from utils.runs import checkpoint
from utils.system.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from utils.training import detection
from utils.training.state import TrainingState

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "DETECTION.md"
SMALL = (*NETWORK, "--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
FASTER = (*SMALL, "-a", "faster_rcnn", "--hflip", 0.5)


def succeed(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def ask_to_stop(monkeypatch, signum: int, step: int | None = None) -> None:
    """Sends this process a signal after its `step`th step; None: as it begins to evaluate."""
    finish_step, detect, steps = TrainingState.finish_step, detection.detect, count(1)

    def stepping(state, broken):
        finish_step(state, broken)
        if next(steps) == step:
            signal.raise_signal(signum)

    def detecting(*args):
        if step is None:
            signal.raise_signal(signum)
        return detect(*args)

    monkeypatch.setattr(TrainingState, "finish_step", stepping)
    monkeypatch.setattr(detection, "detect", detecting)


@pytest.mark.usefixtures("thin")
def test_a_runs_life(detect, shapes, tmp_path, monkeypatch):
    """Mirrored images, their sizes and sampled regions: the same after a stop."""
    monkeypatch.setattr(demo_shapes, "prepare", lambda: shapes)
    flags = ("--epochs", 2, "--seed", 1, "--ksize", "adaptive", "-p", 1, "--min-size", 48, 64)
    run = (*FASTER, *flags, "demo:shapes", "--output")
    lines = detect(*run, "first")
    assert lines[0].startswith("train: 13 images, ")
    assert any(line.startswith("! no weights of the backbone") for line in lines)
    folder = tmp_path / "first"
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "metrics.csv", "last.pth", "previous.pth", "best.pth"} <= names
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss_classifier", "box_AP", "box_ARl"} <= rows[0].keys()
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    last = checkpoint.load(folder / "last.pth")

    # Stopped inside the second epoch and again in its evaluation, and bit for bit the same.
    with pytest.MonkeyPatch.context() as patch:
        ask_to_stop(patch, signal.SIGTERM, step=5)
        lines = detect(*run, "second", code=EXIT_STOPPED)
    assert lines[-2] == "asked to stop: saved in epoch 2 after step 2; go on with"
    assert lines[-1].endswith("detect_main.py --resume second/last.pth")
    again = ("--resume", "auto", "--output", "second", "--ksize", "adaptive")
    refused = r"2 batches with --batch-size 4: leave --batch-size 2 out$"
    with pytest.raises(UserError, match=refused):
        detect(*again, "--batch-size", 2)
    with pytest.MonkeyPatch.context() as patch:
        ask_to_stop(patch, signal.SIGINT)
        lines = detect(*again, code=EXIT_INTERRUPTED)
    assert lines[-2] == "asked to stop: saved in epoch 2 after step 3; go on with"
    assert not any("epoch 2/2  step" in line for line in detect(*again))
    resumed = checkpoint.load(tmp_path / "second" / "last.pth")
    assert same(resumed["state_dict"], last["state_dict"])
    assert resumed["history"] == last["history"]

    # Flags that the run does not agree with.
    with pytest.raises(UserError, match="leave --backbone resnet18, --norm eval out"):
        detect("--resume", folder / "last.pth", "-b", "resnet18", "--norm", "eval")
    with pytest.raises(UserError, match="with --optimizer sgd: leave --optimizer adamw out"):
        detect("--resume", folder / "last.pth", "--optimizer", "adamw")
    assert detect("--resume", folder / "last.pth")[-1].startswith("all 2 epochs are done")

    # With auto, --output is where the run is: nothing is written there.
    before = {path.name for path in folder.iterdir()}
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")
    lines = detect("-e", "--resume", "auto", "--output", "first")
    assert lines[0] == "evaluating first/best.pth"
    assert not torch.backends.cudnn.benchmark  # image shapes change at every step
    assert torch.get_float32_matmul_precision() == "high"
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.slow
def test_the_demo_learns_and_two_ranks_see_what_one_does(detect, run, tmp_path, monkeypatch):
    """Mask R-CNN trained on nine of the demo's images, evaluated on the same ones."""
    pytest.importorskip("sklearn")
    root = tmp_path / "nine"
    write_shapes(root, {"train": 9, "val": 1})
    monkeypatch.setattr(demo_shapes, "prepare", lambda: root)
    flags = ("--epochs", 10, "--lr-steps", 8, "--batch-size", 3, "--seed", 0, "--action", "demo")
    itself = ("--val-images", "train2017")
    itself += ("--val-annotations", "annotations/instances_train2017.json")
    lines = detect("demo:shapes", *flags, *itself)
    folder = tmp_path / "runs" / "mask_rcnn_eca_resnet18_demo-1"
    saved = checkpoint.load(folder / "best.pth")
    # With seeds 0 and 1: boxes 79 and 86, masks 36; with a thousandth of the learning rate: 0.
    assert saved["progress"]["best"]["box_AP50"] > 40
    assert saved["progress"]["best"]["mask_AP50"] > 10

    # All that the document shows of the demo is printed, but for numbers.
    (shown,) = (b.shown for b in blocks(DOCUMENT.read_text()) if b.text == "make demo-detect\n")
    for line in shown.splitlines():
        assert any(pattern(line).fullmatch(own + "\n") for own in lines), line

    # Every detection counts, with its mask, on whichever rank it was made.
    saved["model_kwargs"]["box_score_thresh"] = 0.0
    checkpoint.save(tmp_path / "all.pth", saved)
    results = []
    for name, ranks in (("one", 0), ("two", 2)):
        written = ("--results-json", f"{name}.json", "--output", name)
        weights = ("-e", "--resume", "all.pth", "--device", "cpu", root)
        if ranks:
            succeed(run("detect_main.py", *weights, *written, ranks=ranks))
        else:
            detect(*weights, *written, "--picture", "found.png")
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    one, two = results
    assert {result["image_id"] for result in one} == set(range(1, 10))
    assert {result["category_id"] for result in one} == set(range(1, 6))
    assert [r["segmentation"] for r in two] == [r["segmentation"] for r in one]
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    assert one["images"] == 9
    assert one["segm"]["figures"]["AP50"] > 0.1
    assert two["segm"] == one["segm"]
    assert two["bbox"] == one["bbox"]
    with Image.open(tmp_path / "found.png") as picture:
        picture.load()


@pytest.mark.slow
def test_backbone_weights_and_two_ranks(detect, run, shapes, tmp_path):
    """Statistics fixed, stem and layer1 still, on the backbone of a classification checkpoint; and
    two ranks, each with half of every batch, learn what one learns from the whole."""
    torch.manual_seed(0)
    donor = create_model("eca_resnet18", num_classes=7)
    donor.bn1.running_mean += 1  # so that they are no fresh BatchNorm's
    given = donor.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in given.items()}}, tmp_path / "d.pth")
    weights = ("--backbone-weights", tmp_path / "d.pth")
    flags = (*SMALL, "--epochs", 1, "--seed", 1, "--device", "cpu", *weights, shapes, "--output")
    lines = succeed(run("detect_main.py", *flags, "two", ranks=2))
    assert any("tensors into the backbone" in line for line in lines)
    assert any("norm eval" in line for line in lines)
    trained = checkpoint.load(tmp_path / "two" / "last.pth")["state_dict"]
    prefix = "backbone.body."
    still = {k for k in given if torch.equal(trained.get(prefix + k, torch.empty(0)), given[k])}
    statistics = {k for k in given if k.endswith(("running_mean", "running_var"))}
    frozen = {k for k in given if k.startswith(("conv1.", "bn1.", "layer1."))}
    assert statistics | frozen <= still
    moving = {k for k in given if k.startswith("layer") and k.endswith("conv1.weight")} - frozen
    assert not moving & still

    assert any("sgd lr 0.005 (auto: 0.01 for 8 images)" in line for line in detect(*flags, "one"))
    lines = detect("--resume", "one/last.pth", "--batch-size", 8)
    assert any("sgd lr 0.01 (auto: 0.01 for 8 images)" in line for line in lines)
    alone = checkpoint.load(tmp_path / "one" / "last.pth")["state_dict"]
    for key in moving:
        update = alone[prefix + key] - given[key]
        apart = trained[prefix + key] - alone[prefix + key]
        assert apart.norm() < 0.01 * update.norm(), key

    with pytest.raises(UserError, match="give --ksize 3,5,7,7"):
        detect(*SMALL, *weights, "--ksize", "5555", "--output", "none", shapes)


@pytest.mark.usefixtures("thin")
def test_a_broken_validation_image_costs_no_epoch(detect, shapes, tmp_path, monkeypatch):
    """The run then goes on with the evaluation. The last table is the best epoch's."""
    flags = (*SMALL, "--epochs", 1, "--seed", 1, "-p", 1, shapes, "--output", "run")

    def fails(*_):
        raise UserError("000002.png: cut short; mend the file")

    with monkeypatch.context() as patch:
        patch.setattr(detection, "detect", fails)
        with pytest.raises(UserError, match="mend the file"):
            detect(*flags)
    progress = checkpoint.load(tmp_path / "run" / "last.pth")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 3)

    again = ("--resume", "auto", "--output", "run")
    figures = Summary(dict.fromkeys(FIGURES, 0.5), dict.fromkeys(DIGITS, 0.25))
    monkeypatch.setattr(detection, "evaluate_ranks", lambda found, *_: (found, {"bbox": figures}))
    lines = detect(*again)
    assert not any("epoch 1/1  step" in line for line in lines)
    assert any(line.startswith("epoch 1/1  train loss") for line in lines)

    def no_room(*_):
        raise OSError("No space left on device")

    # As little does a picture that cannot be drawn.
    monkeypatch.setattr(detect_main, "draw_predictions", no_room)
    worse = Summary(dict.fromkeys(FIGURES, 0.125), dict.fromkeys(DIGITS, 0.0625))
    monkeypatch.setattr(detection, "evaluate_ranks", lambda found, *_: (found, {"bbox": worse}))
    lines = detect(*again, "--epochs", 2)
    at = lines.index("epoch 1, the best:")
    assert lines[at + 2].split() == ["box"] + ["50.0"] * 12
    assert [line.split()[-1] for line in lines[at + 4 : at + 9]] == ["25.0"] * 5
    assert lines[at + 9].startswith("done: best box AP 50.0 AP50 50.0 (epoch 1)")


@pytest.mark.parametrize("arch", DETECTORS)
def test_the_demos_settings_suit_every_detector(arch):
    recipe = detect_main.RECIPE.override(**demo_shapes.recipe_of(arch))
    with torch.device("meta"):
        network = create_detector(arch, recipe.backbone, **recipe.settings)
    assert network.backbone.out_channels == recipe.settings["width"]

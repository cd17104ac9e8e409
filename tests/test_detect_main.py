"""detect_main.py as a user runs it: a run's life, resumption, two ranks, errors in one line."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import create_model
from utils import checkpoint
from utils.demo_shapes import write_shapes

NETWORK = ("-a", "retinanet", "-b", "eca_resnet18", "--min-size", 64, "--max-size", 64, "-j", 0)
SMALL = (*NETWORK, "--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--hflip", 0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """13 training and 5 validation images of 64 pixels. Read only."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, {"train": 13, "val": 5}, side=64)
    return folder


def succeed(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def fail(done: subprocess.CompletedProcess, *words: str) -> None:
    """It ended with one line that holds the words, and nothing else on stderr."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in words), line


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_runs_life(run, shapes, tmp_path):
    flags = ("--epochs", 2, "--seed", 1, "--save-every", 2, "-p", 1, "--output", "first")
    lines = succeed(run("detect_main.py", *SMALL, *flags, shapes))
    assert lines[0].startswith("train: 13 images, ")
    assert any(line.startswith("! no --backbone-weights") for line in lines)
    assert any("lr 0.005 (auto: 0.01 for 8 images)" in line for line in lines)
    folder = tmp_path / "first"
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "metrics.csv", "curves.png", "predictions.png", "last.pth",
            "previous.pth", "best.pth"} <= names  # fmt: skip
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train_classification", "box_AP", "box_ARl"} <= rows[0].keys()
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            picture.load()

    # Bit for bit: `previous` was saved inside the second epoch, after two of three steps.
    last = checkpoint.load(folder / "last.pth")
    middle = checkpoint.load(folder / "previous.pth")
    assert middle["progress"]["step"] == 2
    assert not same(middle["state_dict"], last["state_dict"])
    succeed(run("detect_main.py", "--resume", folder / "previous.pth", "--output", "second"))
    again = checkpoint.load(tmp_path / "second" / "last.pth")
    assert same(again["state_dict"], last["state_dict"])
    assert again["history"] == last["history"]

    # Evaluation by one process and by two, and the detections it writes.
    weights = ("-e", "--resume", folder / "last.pth", "--device", "cpu")
    files = ("--results-json", "found.json", "--picture", "found.png", "--output", "one")
    lines = succeed(run("detect_main.py", *weights, *files))
    found = json.loads((tmp_path / "found.json").read_text())
    assert {result["image_id"] for result in found} <= set(range(1, 6))
    assert all(1 <= result["category_id"] <= 10 for result in found)
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert one["images"] == 5
    assert 100 * one["bbox"]["figures"]["AP"] == pytest.approx(float(rows[-1]["box_AP"]))
    succeed(run("detect_main.py", *weights, "--output", "two", ranks=2))
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert two["bbox"] == one["bbox"]
    fail(run("detect_main.py", *weights, *files), "found.json: exists already")


def test_backbone_weights_and_two_ranks(run, shapes, tmp_path):
    """Statistics fixed, stem and layer1 still, on the backbone of a classification checkpoint."""
    torch.manual_seed(0)
    donor = create_model("eca_resnet18", num_classes=7)
    donor.bn1.running_mean += 1  # so that they are no fresh BatchNorm's
    torch.save({"state_dict": {f"module.{k}": v for k, v in donor.state_dict().items()}},
               tmp_path / "donor.pth")  # fmt: skip
    weights = ("--backbone-weights", tmp_path / "donor.pth")
    flags = ("--epochs", 1, "--seed", 1, "--output", "out")
    lines = succeed(run("detect_main.py", *SMALL, *flags, *weights, shapes, ranks=2))
    assert any("tensors into the backbone" in line for line in lines)
    assert any("norm eval" in line for line in lines)
    trained = checkpoint.load(tmp_path / "out" / "last.pth")["state_dict"]
    given = donor.state_dict()
    prefix = "backbone.body."
    still = {k for k in given if torch.equal(trained.get(prefix + k, torch.empty(0)), given[k])}
    statistics = {k for k in given if k.endswith(("running_mean", "running_var"))}
    frozen = {k for k in given if k.startswith(("conv1.", "bn1.", "layer1."))}
    assert statistics | frozen <= still
    assert not {k for k in given if k.startswith("layer2.") and k.endswith("conv1.weight")} & still

    other = ("--ksize", "5555", "--output", "none")
    fail(run("detect_main.py", *SMALL, *weights, *other, shapes), "give --ksize 3,5,7,7")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no DATA given",)),
        (("nowhere",), ("nowhere", "no such folder")),
        (("-e", "DATA"), ("add --resume CKPT",)),
        (("--lr", "fast", "DATA"), ("--lr", "'fast'")),
        (("-b", "eca_resnet51", "DATA"), ("no backbone 'eca_resnet51'", "did you mean")),
        (("--ksize", "3344", "DATA"), ("odd kernel sizes",)),
        (("--batch-size", "99", "DATA"), ("more than the 13 training images",)),
        (("--norm", "sync", "--device", "cpu", "DATA"), ("--norm sync runs on CUDA alone",)),
        (("--val-annotations", "gone.json", "DATA"), ("gone.json", "--val-annotations")),
        (("--resume", "gone.pth", "DATA"), ("gone.pth", "no such file")),
        (("--backbone-weights", "gone.pth", "DATA"), ("gone.pth", "no such file")),
    ],
)
def test_bad_input_is_one_line(run, shapes, arguments, words):
    arguments = [shapes if word == "DATA" else word for word in arguments]
    small = () if "--resume" in arguments or "-b" in arguments else NETWORK
    fail(run("detect_main.py", *small, *arguments), *words)

"""detect_main.py: a run's life, resumption bit for bit, two ranks, errors in one line."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from detect_main import main
from models import create_model
from models.eca_detection import create_detector, describe_detector
from utils import checkpoint
from utils.demo_shapes import write_shapes
from utils.errors import UserError

NETWORK = ("-a", "retinanet", "-b", "eca_resnet18", "--min-size", 64, "--max-size", 64, "-j", 0)
SMALL = (*NETWORK, "--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--hflip", 0)
DIGITS = [f"digit {n}" for n in range(5)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """13 training and 5 validation images of 64 pixels. Read only."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, {"train": 13, "val": 5}, side=64)
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs the script's main with arguments, in an empty folder, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["detect_main.py", *map(str, arguments)])
        capsys.readouterr()
        assert main() == 0
        return capsys.readouterr().out.splitlines()

    yield start
    torch.use_deterministic_algorithms(False)  # which --seed turned on, in this process too


def succeed(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_runs_life(call, run, shapes, tmp_path):
    flags = ("--epochs", 2, "--seed", 1, "--save-every", 2, "-p", 1, "--output", "first")
    lines = call(*SMALL, *flags, shapes)
    assert lines[0].startswith("train: 13 images, ")
    assert any(line.startswith("! no --backbone-weights") for line in lines)
    assert any("sgd lr 0.005 (auto: 0.01 for 8 images)" in line for line in lines)
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
    call("--resume", folder / "previous.pth", "--output", "second")
    again = checkpoint.load(tmp_path / "second" / "last.pth")
    assert same(again["state_dict"], last["state_dict"])
    assert again["history"] == last["history"]

    # Evaluation by one process and by two, and the detections it writes.
    weights = ("-e", "--resume", folder / "last.pth")
    files = ("--results-json", "found.json", "--picture", "found.png", "--output", "one")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")
    call(*weights, *files)
    assert not torch.backends.cudnn.benchmark  # image shapes change at every step
    assert torch.get_float32_matmul_precision() == "high"
    found = json.loads((tmp_path / "found.json").read_text())
    assert {result["image_id"] for result in found} <= set(range(1, 6))
    assert all(1 <= result["category_id"] <= 10 for result in found)
    with Image.open(tmp_path / "found.png") as picture:
        picture.load()
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert one["images"] == 5
    assert 100 * one["bbox"]["figures"]["AP"] == pytest.approx(float(rows[-1]["box_AP"]))
    with pytest.raises(UserError, match=r"found\.json: exists already"):
        call(*weights, *files[:4])
    succeed(run("detect_main.py", *weights, "--device", "cpu", "--output", "two", ranks=2))
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert two["bbox"] == one["bbox"]

    # Flags that the run does not agree with.
    with pytest.raises(UserError, match="leave --backbone resnet18, --norm eval out"):
        call("--resume", folder / "last.pth", "-b", "resnet18", "--norm", "eval")
    with pytest.raises(UserError, match=r"2 batches of 4: leave --batch-size 2 out$"):
        call("--resume", folder / "previous.pth", "--batch-size", 2)
    assert call("--resume", folder / "last.pth")[-1].startswith("all 2 epochs are done")

    # With auto, --output is where the run is: nothing is written there.
    before = {path.name for path in folder.iterdir()}
    lines = call("-e", "--resume", "auto", "--output", "first")
    assert lines[0] == "evaluating first/best.pth"
    assert {path.name for path in folder.iterdir()} == before


def test_backbone_weights_and_two_ranks(call, run, shapes, tmp_path):
    """Statistics fixed, stem and layer1 still, on the backbone of a classification checkpoint."""
    torch.manual_seed(0)
    donor = create_model("eca_resnet18", num_classes=7)
    donor.bn1.running_mean += 1  # so that they are no fresh BatchNorm's
    given = donor.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in given.items()}}, tmp_path / "d.pth")
    weights = ("--backbone-weights", tmp_path / "d.pth")
    flags = ("--epochs", 1, "--seed", 1, "--output", "out", "--device", "cpu")
    lines = succeed(run("detect_main.py", *SMALL, *flags, *weights, shapes, ranks=2))
    assert any("tensors into the backbone" in line for line in lines)
    assert any("norm eval" in line for line in lines)
    trained = checkpoint.load(tmp_path / "out" / "last.pth")["state_dict"]
    prefix = "backbone.body."
    still = {k for k in given if torch.equal(trained.get(prefix + k, torch.empty(0)), given[k])}
    statistics = {k for k in given if k.endswith(("running_mean", "running_var"))}
    frozen = {k for k in given if k.startswith(("conv1.", "bn1.", "layer1."))}
    assert statistics | frozen <= still
    assert not {k for k in given if k.startswith("layer2.") and k.endswith("conv1.weight")} & still

    with pytest.raises(UserError, match="give --ksize 3,5,7,7"):
        call(*SMALL, *weights, "--ksize", "5555", "--output", "none", shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no DATA given"),
        (("nowhere",), "nowhere: no such folder"),
        (("-e", "DATA"), "add --resume CKPT"),
        (("--ksize", "3344", "DATA"), "odd kernel sizes"),
        (("--batch-size", "99", "DATA"), "more than the 13 training images"),
        (("--norm", "sync", "--device", "cpu", "DATA"), "--norm sync runs on CUDA alone"),
        (("--val-annotations", "gone.json", "DATA"), "gone.json: no such file.*--val-annotations"),
        (("--resume", "gone.pth", "DATA"), "gone.pth: no such file"),
        (("--backbone-weights", "gone.pth", "DATA"), "gone.pth: no such file"),
    ],
)
def test_bad_input(call, shapes, arguments, message):
    arguments = [shapes if word == "DATA" else word for word in arguments]
    with pytest.raises(UserError, match=message) as caught:
        call(*(() if "--resume" in arguments else NETWORK), *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", "fast"), ("--lr", "'fast'")),
        (("-b", "eca_resnet51"), ("no backbone 'eca_resnet51'", "did you mean")),
        (("--batchsize", "4"), ("--batchsize", "did you mean --batch-size")),
    ],
)
def test_bad_flags(call, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def save_detector(path, **changes):
    """A RetinaNet as `utils.import_mmdet` writes one, no run and no norm, but without weights."""
    with torch.device("meta"):
        network = create_detector("retinanet", "eca_resnet18", num_classes=5, legacy=True)
    fields = {**describe_detector(network), "model_kwargs": {"legacy": True}, "classes": DIGITS}
    checkpoint.save(path, {**fields, "state_dict": {}, **changes})
    return path


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        (("-a", "faster_rcnn", "--ksize", "5555"), "--arch faster_rcnn, --ksize 5555"),
        (("-b", "resnet18", "--norm", "eval"), "--backbone resnet18"),
        (("--norm", "bn", "--trainable-layers", 3), "--norm bn"),
        (("--trainable-layers", 5, "--legacy"), "--trainable-layers 5"),
        (("--ksize", "3344"), None),
    ],
)
def test_another_network_than_the_files_is_refused(call, shapes, tmp_path, arguments, left_out):
    message = "odd kernel sizes" if left_out is None else (
        f"ours.pth holds retinanet on eca_resnet18, .*: leave {left_out} out"
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        call("-e", "--resume", save_detector(tmp_path / "ours.pth"), *arguments, shapes)


def test_mmdetections_geometry_is_not_put_on_another_network(call, shapes, tmp_path):
    ours = save_detector(tmp_path / "ours.pth", model_kwargs={"legacy": False})
    with pytest.raises(UserError, match="leave --legacy out"):
        call("-e", "--resume", ours, "--legacy", shapes)


def test_another_scripts_checkpoint_is_refused(call, shapes, tmp_path):
    checkpoint.save(tmp_path / "c.pth", {"arch": "resnet18", "state_dict": {}})
    with pytest.raises(UserError, match="no detector's checkpoint"):
        call("-e", "--resume", "c.pth", shapes)

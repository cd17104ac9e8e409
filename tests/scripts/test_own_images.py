"""Images of one's own: a part held out for validation, and pixels prepared in another way."""

import csv
import json
import shutil

import pytest
import torch
from helpers.small_runs import SMALL
from helpers.trees import write_tree
from torchvision.transforms.v2 import functional as F

import export
import predict
from utils.data.decoding import read_image
from utils.runs.checkpoint import Checkpoint

FLAGS = (*SMALL, "--epochs", 1)


@pytest.fixture
def flat(tmp_path):
    """Class folders alone: 8 images in each of a, b and c."""
    return write_tree(tmp_path / "tree", val=1) / "train"


def top1(out: list[str]) -> float:
    (line,) = [line for line in out if "  top-1 " in line and " loss " in line]
    return float(line.split("top-1 ")[1].split(" %")[0])


def test_a_part_is_for_validation_in_training_resumption_and_evaluation(call, flat, tmp_path):
    own = ("--val-split", 0.25, "--class-weights", "balanced", "--sampler", "balanced")
    code, out, err = call(*FLAGS, *own, "--output", "run", flat)
    assert code == 0, err
    assert out[0].startswith(f"train: 18 images in 3 classes ({flat}, --val-split 0.25: the oth")
    assert out[1] == (
        f"val: 6 images in 3 classes ({flat}, --val-split 0.25: 25% of each class, by name)"
    )
    last = tmp_path / "run" / "last.pth"
    assert Checkpoint.read(last).recipe["val_split"] == 0.25
    with open(tmp_path / "run" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    for data in ((), (flat,)):
        code, out, err = call("-e", "--resume", last, *data)
        assert code == 0, err
        assert out[0].startswith("val: 6 images in 3 classes")
        assert top1(out) == pytest.approx(float(row["val_top1"]), abs=1e-3)
    copy = shutil.copytree(flat, tmp_path / "copy")
    assert call("-e", "--resume", last, copy)[1][0].startswith("val: 6 images")

    code, _, err = call("--resume", last, "--epochs", 2, "--val-split", 0.5)
    assert (code, len(err)) == (2, 1)
    assert "leave --val-split 0.5 out" in err[0]
    code, out, err = call("--resume", last, "--epochs", 2)
    assert code == 0, err
    assert "val: 6 images in 3 classes" in "\n".join(out)

    # With another image nobody can say which the run has trained on; another folder is all new.
    for folder in (flat, copy):
        shutil.copy(flat / "a" / "0.png", folder / "a" / "new.png")
    code, _, err = call("-e", "--resume", last, flat)
    assert (code, len(err)) == (2, 1)
    assert "other images than the run was trained on, so those of its --val-split 0.25" in err[0]
    code, out, _ = call("-e", "--resume", last, copy)
    assert (code, out[0]) == (0, f"val: 25 images in 3 classes ({copy})")


def test_a_split_that_cannot_be_is_one_line(call, flat):
    for share, data, line in (
        (
            0.01,
            flat,
            "--val-split 0.01 leaves no image for train or for val of 3 classes (a, b, c)",
        ),
        (0.25, flat.parent, "has train/, and --val-split 0.25 is for class folders alone"),
        (0.25, "demo:digits", "is for class folders alone"),
    ):
        code, _, err = call(*FLAGS, "--val-split", share, data)
        assert (code, len(err)) == (2, 1)
        assert line in err[0]
    code, _, err = call(*FLAGS, flat)
    assert code == 2
    assert "of class folders alone, --val-split 0.2 takes a part for val" in err[0]


@pytest.mark.slow
def test_another_preprocessing_is_kept_and_used_everywhere(call, flat, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    look = ("--interpolation", "bicubic", "--mean", 0.5, "--std", 0.5, 0.25, 0.4)
    code, _, err = call(*FLAGS, *look, "--crop-pct", 0.8, "--output", "run", flat.parent)
    assert code == 0, err
    last = tmp_path / "run" / "last.pth"
    saved = Checkpoint.read(last)
    expected = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.4), "interpolation": "bicubic"}
    assert {name: getattr(saved, name) for name in expected} == expected

    # By torchvision, by hand.
    image = flat / "a" / "0.png"
    pixels = F.resize(read_image(image), [40], F.InterpolationMode.BICUBIC, antialias=True)
    pixels = F.normalize(F.center_crop(pixels, [32]) / 255, expected["mean"], expected["std"])
    with torch.no_grad():
        shares = saved.network().eval()(pixels[None])[0].softmax(0)
    code, out, err = call(last, image, "--format", "json", entry=predict.main)
    assert code == 0, err
    guesses = json.loads("".join(out))[0]["guesses"]
    assert guesses[0]["confidence"] == pytest.approx(shares.max().item(), abs=1e-4)

    figures = top1(call("-e", "--resume", last, flat.parent)[1])
    flags = ("--to", "onnx", "safetensors", "--output", tmp_path / "out")
    code, _, err = call(last, *flags, entry=export.main)
    assert code == 0, err
    for file in sorted((tmp_path / "out").iterdir()):
        code, out, err = call("-e", "--resume", file, flat.parent)
        assert code == 0, err
        assert top1(out) == figures
        if file.suffix == ".onnx":
            continue
        again = Checkpoint.read(file)
        assert {name: getattr(again, name) for name in expected} == expected
    code, _, err = call(*FLAGS, "--mean", 0.5, 0.4, "--output", "two", flat.parent)
    assert (code, err) == (2, ["error: --mean takes one number, or three for red, green and blue"])

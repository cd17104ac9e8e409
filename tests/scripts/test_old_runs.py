"""Runs that an earlier version stopped inside an epoch are evaluated and go on to the same end.

The figures are those to which the version of commit 8801ac8 itself resumed these files, on the
same pictures.
"""

import csv
from dataclasses import fields

import pytest
import torch
from helpers.old_runs import inflate

from models.detection.detectors import detector_from_checkpoint
from models.weights import network_from_checkpoint
from utils.config.classification import Recipe
from utils.runs import checkpoint

# The training loss of epochs 2 and 3, from the file that `inflate` writes. The classifier's third
# epoch is another with another number of threads: batch 6 at 32 pixels is that sensitive.
CLASSIFIER, DETECTOR = (1.7683,), (49.3467, 41.1460)
TOLERANCE = 0.02


def rows_of(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def check(folder, old: dict, losses: tuple[float, ...]) -> None:
    """The run in `folder` went on from `old` to its end, with these losses after epoch 1."""
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["train_loss"]) == old["history"][0]["train_loss"]
    found = [float(row["train_loss"]) for row in rows[1:]]
    assert found[: len(losses)] == pytest.approx(list(losses), rel=TOLERANCE)
    ended = checkpoint.load(folder / "last.pth")
    # All that the old files hold is as it was; what came since is off, as it was then.
    assert ended.keys() - {"class_weights", "interpolation", "mean", "std"} == old.keys()
    assert ended["args"].keys() | ended["recipe"].keys() >= old["args"].keys()
    recipe = {name: ended["recipe"][name] for name in old["recipe"]}
    if "min_size" in recipe:  # today it may be several
        assert recipe.pop("min_size") == (old["recipe"]["min_size"],)
    assert recipe == {name: old["recipe"][name] for name in recipe}
    since = {f.name: f.default for f in fields(Recipe) if f.name not in old["recipe"]}
    assert all(ended["recipe"].get(name, off) == off for name, off in since.items())
    assert ended.get("class_weights") is None
    assert (ended["progress"]["epoch"], ended["progress"]["step"]) == (3, 0)


def test_an_old_classifier_goes_on_and_is_evaluated(call, tree, tmp_path):
    old = inflate("eca_mobilenetv2", tmp_path / "old" / "last.pth")
    network = network_from_checkpoint(old)
    own = network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in old["state_dict"].items())
    code, out, err = call("-e", "--resume", "old/last.pth", "-j", 0, tree)
    assert (code, err) == (0, [])
    assert out[-1].startswith("15 images  top-1")
    code, out, err = call("--resume", "old/last.pth", "-j", 0, tree)
    assert (code, err) == (0, [])
    assert out[0].startswith("train: 24 images")
    line = (
        "the run's decoder torchvision is gone: going on by simplejpeg, which reads the same pixels"
    )
    assert out.count(line) == 1
    check(tmp_path / "runs" / "eca_mobilenetv2-1", old, CLASSIFIER)
    ended = tmp_path / "runs" / "eca_mobilenetv2-1" / "last.pth"
    assert checkpoint.load(ended)["args"]["decoder"] == "simplejpeg"


def test_an_old_detector_goes_on_and_is_evaluated(detect, shapes, tmp_path):
    old = inflate("retinanet", tmp_path / "old" / "last.pth")
    assert detector_from_checkpoint(old).arch == "retinanet"
    assert detect("-e", "--resume", "old/last.pth", "-j", 0, shapes)[-1].startswith("5 images")
    detect("--resume", "old/last.pth", "-j", 0, shapes)
    check(tmp_path / "runs" / "retinanet_eca_resnet18-1", old, DETECTOR)

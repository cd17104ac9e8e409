"""detect_main.py: what it cannot do is said in one line, before any work."""

import pytest
import torch
from helpers.coco_trees import DIGITS, NETWORK

from models.detection.detectors import create_detector, describe_detector
from utils.runs import checkpoint
from utils.system.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no DATA given"),
        (("nowhere",), "nowhere: no such folder"),
        (("-e", "DATA"), "add --resume CKPT"),
        (("--batch-size", "99", "DATA"), "more than the 13 training images"),
        (("--norm", "sync", "--device", "cpu", "DATA"), "--norm sync runs on CUDA alone"),
        (("--val-annotations", "gone.json", "DATA"), "gone.json: no such file.*--val-annotations"),
        (("--results-json", "found.json", "DATA"), "^--results-json does nothing without -e:"),
        (("--resume", "gone.pth", "DATA"), "gone.pth: no such file"),
    ],
)
def test_bad_input(detect, shapes, arguments, message):
    arguments = [shapes if word == "DATA" else word for word in arguments]
    with pytest.raises(UserError, match=message) as caught:
        detect(*(() if "--resume" in arguments else NETWORK), *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", "fast"), ("--lr", "'fast'")),
        (("-b", "eca_resnet51"), ("no backbone 'eca_resnet51'", "did you mean")),
        (("--batchsize", "4"), ("--batchsize", "did you mean --batch-size")),
    ],
)
def test_bad_flags(detect, capfd, arguments, words):
    with pytest.raises(SystemExit) as caught:
        detect(*arguments)
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def save_detector(path, **changes):
    """A RetinaNet as `tools.import_mmdetection` writes one: no run, no norm, here no weights."""
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
        (("--trainable-layers", 5, "--legacy"), "--trainable-layers 5"),
    ],
)
def test_another_network_than_the_files_is_refused(detect, shapes, tmp_path, arguments, left_out):
    message = f"ours.pth holds retinanet on eca_resnet18, .*: leave {left_out} out"
    with pytest.raises(UserError, match=message):
        detect("-e", "--resume", save_detector(tmp_path / "ours.pth"), *arguments, shapes)


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--output", "used", "used: is in use"),
        ("--results-json", "gone/found.json", "there is no folder .*gone"),
        ("--picture", "used/old.png", "exists already"),
    ],
)
def test_evaluation_looks_first_at_where_its_files_go(
    detect, shapes, tmp_path, flag, name, message
):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "old.png").touch()
    without_weights = save_detector(tmp_path / "ours.pth")
    with pytest.raises(UserError, match=message):
        detect("-e", "--resume", without_weights, flag, name, shapes)


def test_mmdetections_geometry_is_not_put_on_another_network(detect, shapes, tmp_path):
    ours = save_detector(tmp_path / "ours.pth", model_kwargs={"legacy": False})
    with pytest.raises(UserError, match="leave --legacy out"):
        detect("-e", "--resume", ours, "--legacy", shapes)


def test_another_scripts_checkpoint_is_refused(detect, shapes, tmp_path):
    checkpoint.save(tmp_path / "c.pth", {"arch": "resnet18", "state_dict": {}})
    with pytest.raises(UserError, match="no detector's checkpoint"):
        detect("-e", "--resume", "c.pth", shapes)

"""README.md's commands are understood, each by its own script."""

import re
import warnings

import torch
from helpers.documents import begins, printed, script_lines, stop_at, within
from helpers.tiny_runs import RUN
from helpers.trees import ROOT

import main
import models
from models import weights
from utils.command_line import detection
from utils.runs import checkpoint
from utils.system.distributed import Context
from utils.training import detector


def write_shapes_of(network, path, **fields):
    """A checkpoint of zeros."""
    tensors = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {**weights.describe_network(network), **fields, "state_dict": tensors})


def test_readme_s_commands_are_understood(workspace, monkeypatch):
    """Each by its own script, up to where it would begin to work; the tools' pages run them."""
    read, starts = detection.read_command_line, []
    monkeypatch.setattr(
        detection, "read_command_line", lambda *words: starts.append(read(*words)) or starts[-1]
    )
    stop_at(monkeypatch, "utils.system.distributed.setup", "utils.inspection.cost.count_cost")
    with torch.device("meta"):
        networks = {
            n: models.create_model(n, num_classes=10) for n in ("eca_resnet18", "eca_resnet50")
        }
    for name, network in networks.items():
        write_shapes_of(network, workspace / f"{name}.pth")
    recipe = main.RECIPE.override(**main.DEMOS["demo:digits"]).as_dict()
    run_fields = {name: RUN[name] for name in checkpoint.RUN}
    state = run_fields | {
        "recipe": recipe,
        "args": {"data": "demo:digits"},
        "img_size": 32,
        "crop_pct": 1.0,
        "progress": {**RUN["progress"], "epoch": 8},
        "classes": list("0123456789"),
    }
    run = workspace / "runs" / "eca_resnet18_demo-1"
    for name in ("last.pth", "best.pth"):
        write_shapes_of(networks["eca_resnet18"], run / name, **state)
    (run / "args.json").write_text("{}")
    detectors = workspace / "runs"
    (detectors / "mask_rcnn_eca_resnet50-1").symlink_to("mask_rcnn_eca_resnet18_demo-1")

    targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    lines = script_lines((ROOT / "README.md").read_text())
    assert len(lines) > 10
    with within(workspace):
        for words in lines:
            if words[0] == "make":
                assert words[1] in targets, words
                continue
            name = next((w for w in words if w.startswith("eca_resnet")), "eca_resnet18")
            words = [f"{name}.pth" if word == "CKPT" else word for word in words]
            with printed() as page:
                begun = begins(words, ROOT)
            assert begun, f"{words} ended with\n{page()}"
            if "--backbone-weights" in words:  # taken up after the data
                config, start = starts[-1]
                nowhere = Context(torch.device("meta"))
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _, notes = detector.build_network(
                        config.recipe, config.network, start, ["a"] * 90, nowhere
                    )
                assert "Loaded" in notes[1]


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {
        word
        for page in pages
        for word in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert {"venv", "demo", "test"} <= named <= targets

"""README.md's and the ablation's commands are understood, each by its own script."""

import sys
import warnings

import pytest
import torch
from helpers.documents import Reached, begins, printed, script_lines, stop_at, within
from helpers.tiny_runs import RUN
from helpers.trees import ROOT

import detect_main
import main
import models
from assembly import detector
from models import weights
from tools import ablation
from utils.options.parser import Parser
from utils.runs import checkpoint
from utils.runs.resume import Start
from utils.system.distributed import Context


def write_shapes_of(network, path, **fields):
    """A checkpoint of zeros."""
    tensors = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {**weights.describe_network(network), **fields, "state_dict": tensors})


def test_readme_s_commands_are_understood(workspace, monkeypatch):
    """Each by its own script, up to where it would begin to work; the tools' pages run them."""
    monkeypatch.setattr(Parser, "parse_args", record := Record(Parser.parse_args))
    stop_at(monkeypatch, "utils.system.distributed.setup", "utils.cost.classifier_cost.count_cost")
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
            if "--backbone-weights" in words:  # read after the data
                given = record.last
                settings = {k: getattr(given, k) for k in ("arch", "backbone")}
                here = Context(torch.device("cpu"))
                first = detector.read_first_weights(given, {})
                with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                    recipe = detect_main.RECIPE.override(**settings)
                    _, notes = detector.build_network(
                        given, recipe, Start(None, first, None), ["a"] * 90, here
                    )
                assert "Loaded" in notes[1]


def test_the_ablation_s_commands_are_understood(tmp_path, monkeypatch):
    """Those of its page, and each of main.py that they start."""
    started = []
    monkeypatch.setattr(ablation, "run_all", lambda commands, *_: started.extend(commands.values()))
    monkeypatch.setattr(ablation, "collect", lambda folders: [])
    monkeypatch.setattr(ablation, "draw", lambda *_: b"")
    stop_at(monkeypatch, "utils.system.distributed.setup")
    lines = script_lines((ROOT / "docs" / "ABLATION.md").read_text())
    with within(tmp_path), printed():
        for words in lines:
            if words[:2] == ["-m", "tools.ablation"]:
                monkeypatch.setattr(sys, "argv", words[1:])
                assert ablation.main() == 0
        assert len(started) == 27 + 7 + 6
        for command in started:
            monkeypatch.setattr(sys, "argv", command[1:])
            with pytest.raises(Reached):
                main.main()


class Record:
    """Calls a method of argparse, and keeps what it returned."""

    def __init__(self, method):
        self.method, self.last = method, None

    def __get__(self, parser, _):
        def call(*arguments):
            self.last = self.method(parser, *arguments)
            return self.last

        return call

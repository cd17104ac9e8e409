"""docs/DETECTION.md: its commands are parsed by their scripts, and build; its Python runs.

What they do is tested with the scripts; here, that a reader could type them. The demo's output is
held against the document in test_detect_main.py.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers.documents import blocks, command_lines, run_command, within

import detect_main
from models.detection.detectors import create_detector, describe_detector
from tests.tools.test_import_mmdetection import file_of_v1
from utils.command_line.parser import parser_of
from utils.config.detection import DetectionConfig
from utils.data import demo_shapes
from utils.runs import checkpoint

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = blocks((ROOT / "docs" / "DETECTION.md").read_text())
LAUNCHER = re.compile(r"torchrun --nproc-per-node=\d+")


def commands() -> list[str]:
    """Those of the document, and in the place of `make TARGET` the target's own."""
    found = []
    for block in BLOCKS:
        for line in command_lines(block.text) if block.kind == "commands" else ():
            if line.startswith("make "):
                recipe = (ROOT / "Makefile").read_text().split(f"\n{line.split()[1]}: ")[1]
                lines = recipe.split("\n\n")[0].splitlines()[1:]
                found += [re.sub(r".*\$\(RUN\)", "python", own) for own in lines]
            else:
                found.append(LAUNCHER.sub("python", line))
    return found


def test_every_command_is_known_here():
    scripts = [line.split()[1] for line in commands()]
    assert scripts.count("detect_main.py") == 7
    assert sorted(set(scripts)) == ["-m", "detect_main.py", "paras_flops.py"]


@pytest.mark.parametrize("line", [line for line in commands() if " detect_main.py " in line])
def test_detect_main_reads_it_and_builds(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
    recipe = detect_main.RECIPE
    typed = parser_of(DetectionConfig.parts(), recipe, "").typed()
    if typed.get("data") == demo_shapes.SHAPES:
        recipe = recipe.override(**demo_shapes.recipe_of(typed.get("arch")))
    recipe = recipe.override(**{k: v for k, v in typed.items() if k in recipe.as_dict()})
    with torch.device("meta"):
        create_detector(recipe.arch, recipe.backbone, typed.get("ksize"), **recipe.settings)


def test_the_other_commands_run(tmp_path):
    torch.save(file_of_v1("retinanet"), tmp_path / "THEIRS.pth")
    with within(tmp_path):
        for line in commands():
            if " detect_main.py " not in line:
                run_command(line, ROOT, shown="")
    assert checkpoint.load(tmp_path / "ours.pth")["arch"] == "retinanet"


def test_the_python_block_finds_objects(tmp_path):
    (block,) = (block for block in BLOCKS if block.kind == "python")
    settings = {"min_size": 64, "max_size": 64, "box_score_thresh": 0.0}
    network = create_detector("mask_rcnn", "eca_resnet18", num_classes=3, width=16, **settings)
    fields = {**describe_detector(network), "classes": ["ant", "bee"]}
    checkpoint.save(tmp_path / "best.pth", {**fields, "state_dict": network.state_dict()})
    names = {"image": torch.rand(3, 48, 64)}
    with within(tmp_path), torch.inference_mode():
        exec(compile(block.text, "docs/DETECTION.md", "exec"), names)
    assert names["found"]["masks"].shape[1:] == (1, 48, 64)
    assert len(names["found"]["boxes"])

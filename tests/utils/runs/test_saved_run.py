"""A checkpoint as a value: what it says of itself, and of the run that it can carry on."""

import dataclasses

import pytest
import torch
from helpers.tiny_runs import RUN, tiny_run

from utils.runs import checkpoint
from utils.runs.saved_run import Checkpoint
from utils.system.errors import UserError


def test_a_run_says_where_it_stands(tmp_path):
    fields = {"classes": ["a", "b"], "img_size": 32, "environment": {"cpu_threads": 3}}
    state = tiny_run(**fields, progress={**RUN["progress"], "epoch": 4, "step": 7})
    checkpoint.save(tmp_path / "last.pth", state)
    saved = Checkpoint.read(tmp_path / "last.pth")
    assert (saved.file, saved.classes, saved.img_size) == (tmp_path / "last.pth", ("a", "b"), 32)
    assert saved.run.place == (4, 7)
    assert (saved.run.seed, saved.run.cpu_threads) == (RUN["seed"], 3)
    assert saved.run.recipe == RUN["recipe"]
    assert not saved.is_detector
    with pytest.raises(dataclasses.FrozenInstanceError):
        saved.run.seed = 1


def test_weights_alone_are_no_run(tmp_path):
    torch.save({"fc.weight": torch.ones(2, 2), "classes": "no names of ours"}, tmp_path / "w.pth")
    saved = Checkpoint.read(tmp_path / "w.pth")
    assert (saved.run, saved.classes, saved.img_size, saved.crop_pct) == (None, None, None, None)


def test_a_run_that_lacks_its_place_is_refused(tmp_path):
    checkpoint.save(tmp_path / "x.pth", tiny_run(progress={"epoch": 1}))
    with pytest.raises(UserError, match=r"x\.pth: the field progress cannot be used"):
        Checkpoint.read(tmp_path / "x.pth")


def test_a_detector_is_told_by_its_backbone(tmp_path):
    checkpoint.save(tmp_path / "d.pth", tiny_run(arch="retinanet", backbone="resnet18"))
    assert Checkpoint.read(tmp_path / "d.pth").is_detector

"""The folder in which a reader of the documents is."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trees import ROOT
from PIL import Image

from models.detection.detectors import create_detector, describe_detector
from utils.data import demo_sets
from utils.runs import checkpoint


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """The demo's tree with a twentieth of its images: those whose names the documents have."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("home")
    demo_sets.write_digits(folder / "digits")
    for part in ("train", "val"):
        for place in (folder / "digits" / part).iterdir():
            files = sorted(place.iterdir())
            kept = [file for file in files if file.name < "03"] if part == "val" else files[:7]
            for file in set(files) - set(kept):
                file.unlink()
    return folder


@pytest.fixture
def workspace(tmp_path, few_digits, monkeypatch):
    """The folder that a reader is in: the repository, the demo's data, images and a detector."""
    for source in (*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "utils", ROOT / "models"):
        (tmp_path / source.name).symlink_to(source)
    shutil.copytree(few_digits, tmp_path / "demo_data")
    monkeypatch.setattr(demo_sets, "HOME", Path("demo_data"))
    photos = tmp_path / "demo_data" / "shapes" / "val2017"
    photos.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(photos / "000001.png")

    torch.manual_seed(0)
    settings = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.3, "width": 16}
    network = create_detector("mask_rcnn", "resnet18", num_classes=3, norm="bn", **settings)
    state = {**describe_detector(network), "classes": ["ant", "bee"], "category_ids": [1, 2]}
    path = tmp_path / "runs" / "mask_rcnn_eca_resnet18_demo-1" / "best.pth"
    path.parent.mkdir(parents=True)
    checkpoint.save(path, {**state, "state_dict": network.state_dict()})

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # activated
    deterministic, precision = (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
    yield tmp_path
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)

"""A run's checkpoint with tensors of a few numbers: whole in form, of no network."""

import copy
from pathlib import Path
from typing import Any

import torch

from utils.runs.checkpoint import Checkpoint, SavedRun

RECIPE = {
    "arch": "mobilenetv2",
    "epochs": 3,
    "batch_size": 6,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "step",
}
ROW = {"epoch": 0, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 50.0}
RUN = {
    "format": 1,
    "arch": "mobilenetv2",
    "attention": "none",
    "ksize": None,
    "num_classes": 3,
    "model_kwargs": {"width_mult": 1.0},
    "classes": ["a", "b", "c"],
    "img_size": 32,
    "crop_pct": 0.875,
    "recipe": RECIPE,
    "args": {"data": "tree"},
    "seed": 1,
    "train_digest": "0" * 16,
    "pretrained": None,
    "train_images": 24,
    "environment": {"torch": "2.0"},
    "state_dict": {"weight": torch.ones(2, 2)},
    "raw_state_dict": {"weight": torch.ones(2, 2)},
    "averaged_steps": 4,
    "optimizer": {
        "state": {0: {"momentum_buffer": torch.ones(2, 2)}},
        "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": [0]}],
    },
    "scaler": {},
    "progress": {
        "epoch": 1,
        "step": 0,
        "sums": torch.zeros(1, 4, dtype=torch.float64),
        "best": ROW,
        "broken": [],
    },
    "history": [ROW],
}


def tiny_run(**changes: Any) -> dict[str, Any]:
    """The contents of a classifier's run with some fields replaced."""
    return {**copy.deepcopy(RUN), **changes}


def run_of(snapshot: dict[str, Any]) -> SavedRun:
    """The run that a state's snapshot is saved as, as whoever goes on with it reads it."""
    around = {name: RUN[name] for name in ("format", "recipe", "args", "seed", "train_images")}
    run = Checkpoint.of(Path("last.pth"), {**around, "classes": [], **snapshot}).run
    assert run is not None
    return run

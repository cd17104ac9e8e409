"""What tests of one script share: the script in this process, and weights for it."""

from pathlib import Path

import pytest
import torch
from helpers.other_sets import OUTPUTS, SHUFFLED

import export
import models
import predict
from models import weights
from utils.runs import checkpoint


@pytest.fixture
def export_cli(call):
    """Runs export.py, or another script's main: (exit code, all that it printed)."""

    def start(*arguments, main=export.main):
        code, out, err = call(*arguments, entry=main)
        return code, "".join(f"{line}\n" for line in (*out, *err))

    return start


@pytest.fixture
def predict_cli(call):
    """Runs predict.py: (exit code, standard output, standard error)."""

    def start(*arguments):
        code, out, err = call(*arguments, entry=predict.main)
        return code, *("".join(f"{line}\n" for line in lines) for lines in (out, err))

    return start


@pytest.fixture(scope="module")
def network_of_twelve() -> torch.nn.Module:
    """A network of twelve outputs whose predictions differ from image to image."""
    torch.manual_seed(3)
    made = models.create_model("mobilenetv2", num_classes=OUTPUTS, width_mult=0.25)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of what it sees
    with torch.no_grad():
        made.train()(torch.randn(64, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3))
        made.classifier[-1].weight.mul_(30)
    return made.eval()


@pytest.fixture
def nameless(network_of_twelve, tmp_path) -> Path:
    """Weights alone, which say nothing of their classes."""
    torch.save(network_of_twelve.state_dict(), tmp_path / "nameless.pth")
    return tmp_path / "nameless.pth"


@pytest.fixture
def named(network_of_twelve, tmp_path) -> Path:
    """Its classes stand in another order than the sorted one."""
    fields = {**weights.describe_network(network_of_twelve), "classes": SHUFFLED}
    fields |= {"img_size": 32, "crop_pct": 1.0, "state_dict": network_of_twelve.state_dict()}
    checkpoint.save(tmp_path / "named.pth", fields)
    return tmp_path / "named.pth"

"""Checkpoints of classifiers, without the run that led to them."""

import torch

from models import create_model, weights
from utils.runs import checkpoint


def write_checkpoint(path, name="eca_resnet18", img_size=48, **kwargs):
    """A checkpoint as main.py writes it, of a network whose BatchNorms have seen something."""
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, **kwargs)
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64) * 2 + 1)
    state = {
        **weights.describe_network(network),
        "classes": ["a", "b", "ü"],
        "img_size": img_size,
        "crop_pct": 0.9,
        "state_dict": network.state_dict(),
    }
    checkpoint.save(path, state)
    return network.eval()

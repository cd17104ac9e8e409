"""Checkpoints of classifiers, without the run that led to them."""

import torch

from models import create_model, weights
from utils.runs import checkpoint


def write_checkpoint(path, name="eca_resnet18", img_size=48, fields=None, **kwargs):
    """A checkpoint as main.py writes it, of a network whose BatchNorms have seen something.

    Args:
        fields: of the checkpoint, in the place of these or besides them.
        kwargs: of the network.
    """
    torch.manual_seed(0)
    fields = {"classes": ["a", "b", "ü"], "img_size": img_size, "crop_pct": 0.9, **(fields or {})}
    network = create_model(name, num_classes=len(fields["classes"]), **kwargs)
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64) * 2 + 1)
    state = weights.describe_network(network) | fields
    checkpoint.save(path, {**state, "state_dict": network.state_dict()})
    return network.eval()

"""Makes the state in which a detector's training begins."""

from collections.abc import Sequence

import torch
from torch import nn

from utils.detection.engine import LossMeter, make_optimizer
from utils.recipes.detection import DetectionRecipe
from utils.training.finite_guard import NonFiniteGuard
from utils.training.state import RunState

WARMUP = "--warmup-steps"  # what a remedy calls it


def first_state(
    network: nn.Module,
    recipe: DetectionRecipe,
    losses: Sequence[str],
    device: torch.device,
    rank: int = 0,
    fp16: bool = False,
) -> RunState:
    """Returns the state in which a run begins.

    Args:
        network: on its device, with its first weights, without any parallel wrapping.
        losses: names of the losses that the network returns in training.
        fp16: scale the loss, as float16 needs it.
    """
    return RunState(
        network,
        make_optimizer(network, recipe, device),
        torch.amp.GradScaler(device.type, enabled=fp16),
        LossMeter(device, losses),
        NonFiniteGuard(device, WARMUP),
        rank,
    )

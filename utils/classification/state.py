"""Makes the state in which a classifier's training begins."""

from collections.abc import Mapping

import torch
from torch import nn

from utils.classification.metrics import ClassificationMeter
from utils.recipes.classification import Recipe
from utils.training.finite_guard import NonFiniteGuard
from utils.training.optimizer import make_optimizer
from utils.training.state import RunState
from utils.training.weight_average import WeightAverage


def first_state(
    network: nn.Module,
    recipe: Recipe,
    device: torch.device,
    rank: int = 0,
    fp16: bool = False,
    compiled: bool = False,
    lr_scales: Mapping[str, float] | None = None,
) -> RunState:
    """Returns the state in which a run begins.

    Args:
        network: on its device, with its first weights, without any parallel wrapping.
        fp16: scale the loss, as float16 needs it.
        compiled: `network` was compiled; an average of its weights is then, too.
        lr_scales: factors of the learning rate by the parameters' names; None for 1.
    """
    average = WeightAverage(network, recipe.ema) if recipe.ema else None
    if compiled and average is not None:
        average.module.compile()  # a copy of a compiled network is not compiled
    numbers = (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.norm_decay)
    return RunState(
        network,
        make_optimizer(recipe.optimizer, network, *numbers, lr_scales),
        torch.amp.GradScaler(device.type, enabled=fp16),
        ClassificationMeter(device),
        NonFiniteGuard(device),
        rank,
        average=average,
    )

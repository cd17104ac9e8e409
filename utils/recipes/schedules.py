"""Computes the learning rate as a pure function of the step, so that no schedule needs saving."""

import math
from collections.abc import Callable
from functools import partial

from utils.recipes.classification import Recipe

SCHEDULES = ("step", "exp", "cosine")
UNUSED = {"step": (), "exp": ("lr_step",), "cosine": ("lr_step", "lr_decay")}


def lr_at(
    step: int,
    steps_per_epoch: int,
    *,
    lr: float,
    epochs: int,
    schedule: str = "step",
    warmup_epochs: float = 0,
    lr_step: int = 30,
    lr_decay: float = 0.1,
) -> float:
    """Returns the learning rate of one optimizer step.

    Args:
        step: steps done so far in the whole run.
        steps_per_epoch: to turn steps into epochs.
        lr: the peak.
        epochs: length of the run, which "cosine" spans.
        schedule: "step" multiplies by `lr_decay` every `lr_step` epochs (the paper's ResNets, with
            30 and 0.1); "exp" by `lr_decay` every epoch (its MobileNetV2, with 0.98); "cosine"
            goes to zero along half a period, after the warm-up, moving at every step.
        warmup_epochs: a linear rise to the peak, step by step, before anything else.
    """
    epoch = step // steps_per_epoch
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "step":
        return lr * lr_decay ** (epoch // lr_step)
    if schedule == "exp":
        return lr * lr_decay**epoch
    assert schedule == "cosine", schedule
    total = max(1, epochs * steps_per_epoch - warmup_steps)
    done = min(1.0, (step - warmup_steps) / total)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


def rate_of(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """Returns a recipe's learning rate as a function of the step."""
    return partial(
        lr_at,
        steps_per_epoch=steps_per_epoch,
        lr=recipe.lr,
        epochs=recipe.epochs,
        schedule=recipe.schedule,
        warmup_epochs=recipe.warmup_epochs,
        lr_step=recipe.lr_step,
        lr_decay=recipe.lr_decay,
    )

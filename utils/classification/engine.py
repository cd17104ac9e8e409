"""Trains a classifier for one epoch, and evaluates it, with any optimizer.

Nothing here knows the command line, files or the terminal. `train_epoch` is a generator that rests
after every optimizer step, so that its caller can print, save or stop between steps, where the
state is whole.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from utils.classification.metrics import ClassificationMeter, binary_cross_entropy, cross_entropy
from utils.classification.mixing import Mix, leading_class, make_mix, unmixed
from utils.classification.real_labels import RealMeter
from utils.data.loading import Batch
from utils.data.sampler import mix_seed
from utils.recipes.classification import Recipe
from utils.recipes.schedules import rate_of
from utils.system import distributed
from utils.system.backends import AutocastFactory
from utils.training.finite_guard import NonFiniteGuard

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StepRule:
    """Says how an optimizer step is done, the same in the whole run.

    Args:
        lr_at: step of the run → learning rate.
        seed: with the step number it seeds everything random in it (mixing, dropout), so that a
            resumed run needs no generator state.
        autocast: makes the context in which forward and loss run.
        loss_fn: (logits, targets) → mean loss.
        mix: blends images and targets, see `utils.classification.mixing`.
        accumulate: equal parts of a batch that are taken one after the other, for a memory that
            does not hold the whole; but for BatchNorm, which sees parts, the gradient is the same.
        clip_grad: the gradient's largest norm over all parameters; 0 leaves it as it is.
    """

    lr_at: Callable[[int], float]
    seed: int
    autocast: AutocastFactory
    loss_fn: Loss = cross_entropy
    mix: Mix = unmixed
    accumulate: int = 1
    clip_grad: float = 0.0

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        steps_per_epoch: int,
        seed: int,
        autocast: AutocastFactory,
        num_classes: int,
        class_weights: torch.Tensor | None = None,
    ) -> "StepRule":
        """Returns the recipe's rule.

        Args:
            num_classes: the network's outputs.
            class_weights: (num_classes,) of the loss, on the device; None for 1.
        """
        return cls(
            lr_at=rate_of(recipe, steps_per_epoch),
            seed=seed,
            autocast=autocast,
            loss_fn=_loss_of(recipe, class_weights),
            mix=make_mix(recipe.mixup, recipe.cutmix, num_classes),
            accumulate=recipe.accumulate,
            clip_grad=recipe.clip_grad,
        )


def _loss_of(recipe: Recipe, class_weights: torch.Tensor | None) -> Loss:
    shared: dict[str, Any] = {
        "label_smoothing": recipe.label_smoothing,
        "class_weights": class_weights,
    }
    if recipe.loss == "bce":
        return partial(binary_cross_entropy, **shared, threshold=recipe.bce_threshold)
    return partial(cross_entropy, **shared)


def train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    meter: ClassificationMeter,
    guard: NonFiniteGuard,
    rule: StepRule,
    first_step: int,
) -> Iterator[Batch]:
    """Trains on `batches`, yielding each batch after its step.

    Args:
        network: in any parallel wrapping; images (N, 3, S, S) → logits (N, C).
        optimizer: on CUDA one with `fused=True` is not waited for at each step (see the guard).
        scaler: gradient scaler, disabled unless fp16 is used.
        meter: gets the loss that is trained on; of mixed images top-1 and top-5 count for the class
            with the larger share, and so stay below what they are on whole images.
        first_step: the run's step number of the first batch.

    Raises:
        UserError: exit code 3, when the loss is not finite (see NonFiniteGuard).
    """
    network.train()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step, batch in enumerate(batches, first_step):
        torch.manual_seed(mix_seed(rule.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = rule.lr_at(step) * group.get("lr_scale", 1.0)
        images, targets = rule.mix(batch.images, batch.targets)
        optimizer.zero_grad(set_to_none=True)
        doubtful = _backward(network, images, targets, scaler, meter, rule)
        if rule.clip_grad:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trained, rule.clip_grad)
            # With a scaler an overflowing gradient is in order: it skips the step and scales less.
            doubtful = doubtful if scaler.is_enabled() else doubtful + norm
        what = "loss or gradient" if rule.clip_grad else "loss"
        guard.before_update(doubtful, step, optimizer, what)
        scaler.step(optimizer)
        scaler.update()
        yield batch


def _backward(
    network: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    scaler: torch.amp.GradScaler,
    meter: ClassificationMeter,
    rule: StepRule,
) -> torch.Tensor:
    """Adds the gradient of the batch's mean loss, part by part, and returns that loss."""
    parts = zip(images.chunk(rule.accumulate), targets.chunk(rule.accumulate), strict=True)
    total = torch.zeros((), device=images.device)
    for number, (x, y) in enumerate(parts, 1):
        # Ranks add up their gradients once, in the last part's backward.
        last = number == rule.accumulate
        with nullcontext() if last else distributed.without_gradient_sync(network):
            with rule.autocast():
                logits = network(x)
                loss = rule.loss_fn(logits, y)
            scaler.scale(loss / rule.accumulate).backward()
        total += loss.detach() / rule.accumulate
        meter.update(loss, logits, leading_class(y))
    return total


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: AutocastFactory,
    stop: Callable[[], bool] = lambda: False,
    meter: ClassificationMeter | None = None,
    real: RealMeter | None = None,
) -> dict[str, float] | None:
    """Returns mean loss and top-1/top-5 (in %) of `network` over all ranks' `batches`.

    Args:
        meter: what sums; one that keeps more, for a caller who wants it; None for a plain one.
        real: counts by other labels, too; the batches' targets are then the numbers of the images.

    Returns:
        {"loss", "top1", "top5", "images"}, or None when `stop()` said so before the end.
    """
    network.eval()
    meter = ClassificationMeter(device) if meter is None else meter
    for batch in batches:
        if stop():
            return None
        with autocast():
            logits = network(batch.images)
        targets = batch.targets if real is None else real.count(logits, batch.targets)
        meter.update(cross_entropy(logits, targets), logits, targets)
    total = meter.total()
    return {**meter.means(total), "images": int(total[3])}

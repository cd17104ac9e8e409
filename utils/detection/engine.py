"""Trains a detector for one epoch, and collects its detections over a data set.

As in utils.classification.engine the training loop is a generator that rests after every
step; the step is its own: a dict of losses, a clipped gradient, images of several sizes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from utils.data.sampler import mix_seed
from utils.detection.batches import DetectionBatch
from utils.detection.coco_evaluation import Result, to_results
from utils.recipes.detection import DetectionRecipe
from utils.system import distributed
from utils.system.backends import AutocastFactory
from utils.training.finite_guard import NonFiniteGuard
from utils.training.optimizer import start_momentum


class LossMeter:
    """Sums a detector's losses on the device, and gives their means.

    State: a sum for each name and the number of steps, this rank's share.
    """

    def __init__(self, device: torch.device, names: Sequence[str]):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names) + 1, dtype=wide, device=device)

    @torch.no_grad()
    def update(self, losses: dict[str, torch.Tensor]) -> None:
        values = [losses[name].detach().to(self.sums.dtype) for name in self.names]
        self.sums += torch.stack([*values, torch.ones_like(values[0])])

    def total(self) -> torch.Tensor:
        """Returns the sums over all ranks, on the host. Synchronises; call it on every rank."""
        return distributed.all_reduce(self.sums.clone()).cpu()

    def means(self, total: torch.Tensor) -> dict[str, float]:
        """Returns the mean of each loss, and of their sum as "loss"."""
        *sums, steps = total.tolist()
        means = [value / (steps or float("nan")) for value in sums]
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True))}


def make_optimizer(
    network: nn.Module, recipe: DetectionRecipe, device: torch.device
) -> torch.optim.Optimizer:
    """Returns the recipe's optimizer over the parameters that train."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    shared = {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "fused": device.type in ("cpu", "cuda") or None,
    }
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, **shared)
    optimizer = torch.optim.SGD(trained, momentum=recipe.momentum, **shared)
    start_momentum(optimizer)
    return optimizer


def train_epoch(
    network: nn.Module,
    batches: Iterable[DetectionBatch],
    optimizer: torch.optim.Optimizer,
    meter: LossMeter,
    guard: NonFiniteGuard,
    *,
    first_step: int,
    lr_at: Callable[[int], float],
    clip: float,
    seed: int,
    autocast: AutocastFactory,
    scaler: torch.amp.GradScaler,
) -> Iterator[DetectionBatch]:
    """Trains on `batches`, yielding each batch after its step.

    Args:
        network: a torchvision detector, bare or in DistributedDataParallel.
        first_step: the run's step number of the first batch.
        lr_at: step → learning rate.
        clip: the gradient's largest norm over all trained parameters.
        seed: with the step number it seeds the sampling of anchors and regions, so that a resumed
            run needs no generator state.
        autocast, scaler: as in `utils.classification.engine.train_epoch`.

    Raises:
        UserError: exit code 3, when loss or gradient is not finite (see NonFiniteGuard).
    """
    network.train()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step, batch in enumerate(batches, first_step):
        torch.manual_seed(mix_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        with autocast():
            losses = network(batch.images, batch.targets)
            loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, clip)
        # With a scaler an overflowing gradient is in order: it skips the step and scales less.
        doubtful = loss.detach() if scaler.is_enabled() else loss.detach() + norm
        guard.before_update(doubtful, step, optimizer, "loss or gradient")
        scaler.step(optimizer)
        scaler.update()
        meter.update(losses)
        yield batch


@torch.inference_mode()
def detect(
    network: nn.Module,
    batches: Iterable[DetectionBatch],
    category_ids: Sequence[int | None],
    first_label: int,
    autocast: AutocastFactory,
    stop: Callable[[], bool] = lambda: False,
) -> list[Result] | None:
    """Returns this rank's detections in COCO's result format, or None when `stop()` said so.

    Masks are run-length coded here, image by image: as pixels those of COCO's validation images
    would be 150 GB.
    """
    network.eval()
    results: list[Result] = []
    for batch in batches:
        if stop():
            return None
        with autocast():
            found = network(batch.images)
        for image_id, detections in zip(batch.image_ids, found, strict=True):
            results += to_results(detections, image_id, category_ids, first_label)
    return results

"""Trains a classifier for an epoch, evaluates it, and measures both: loss, top-1, top-5."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from utils.config.classification import Recipe
from utils.data.image_folder import ImageFolder
from utils.data.loader import Batch, Loader
from utils.data.sampler import SeededBatches, mix_seed
from utils.data.transforms import Preprocessing
from utils.runs.writer import Curve, Panel, RunFiles
from utils.system import backends, distributed
from utils.system.backends import AutocastFactory
from utils.system.distributed import Votes
from utils.system.errors import UserError
from utils.system.signals import StopRequest
from utils.system.style import (
    GREY,
    MAIN,
    MEDIUM_CELL,
    PLAIN,
    SECOND,
    WRONG,
    Cell,
    draw_grid,
    plain_name,
)
from utils.system.text import all_epochs, counted
from utils.training.classification_data import (
    RealMeter,
    TrainingData,
    training_batches,
    validation_batches,
)
from utils.training.optim import StepRule
from utils.training.progress import Progress
from utils.training.state import TrainingState, summed, wide

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
FIGURES = ("loss", "top1", "top5")
SHOWN = 16  # images in the pictures of a run
RECALL = "recall"  # a figure of evaluations alone, where --best-by wants it


@dataclass(frozen=True)
class Objective:
    """Holds what a classifier is trained for.

    Args:
        loss: (logits, targets) → mean loss.
        mix: blends images and targets, see `make_mix`.
    """

    loss: Loss
    mix: Mix

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        num_classes: int,
        class_weights: Sequence[float] | None,
        device: torch.device,
    ) -> "Objective":
        """Returns a recipe's objective.

        Args:
            num_classes: the network's outputs.
            class_weights: factors of the data's classes; None for 1. --num-classes may give outputs
                that no image is of: theirs are 1.
        """
        weights = None
        if class_weights is not None:
            rest = (1.0,) * (num_classes - len(class_weights))
            weights = torch.tensor((*class_weights, *rest), device=device)
        shared: dict[str, Any] = {
            "label_smoothing": recipe.label_smoothing,
            "class_weights": weights,
        }
        loss = partial(cross_entropy, **shared)
        if recipe.loss == "bce":
            loss = partial(binary_cross_entropy, **shared, threshold=recipe.bce_threshold)
        return cls(loss, make_mix(recipe.mixup, recipe.cutmix, num_classes))


def train_one_epoch(
    state: TrainingState,
    network: nn.Module,
    batches: Iterable[Batch],
    rule: StepRule,
    aim: Objective,
    progress: Progress,
    run: RunFiles,
    votes: Votes,
    stop: StopRequest,
) -> bool:
    """Trains on `batches`, the rest of the epoch in which `state` stands, saving where due.

    Args:
        network: `state.network` in its parallel wrapping; images (N, 3, S, S) → logits (N, C).

    Returns:
        Whether the epoch is done. False: the run was asked to stop, and is saved.

    Raises:
        UserError: exit code 3, when the loss is not finite (see NonFiniteGuard).
    """
    network.train()
    optimizer, scaler, recipe = state.optimizer, state.scaler, rule.recipe
    first = state.epoch * rule.steps_per_epoch  # the epoch's first step, counted over the run
    for batch in batches:
        torch.manual_seed(mix_seed(rule.seed, step := first + state.step))
        state.set_lr(rule.lr_at(step))
        images, targets = aim.mix(batch.images, batch.targets)
        optimizer.zero_grad(set_to_none=True)
        doubtful = torch.zeros((), device=images.device)
        parts = zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True)
        for number, (x, y) in enumerate(parts, 1):
            # Ranks add up their gradients once, in the last part's backward.
            last = number == recipe.accumulate
            with nullcontext() if last else distributed.without_gradient_sync(network):
                with rule.autocast():
                    loss = aim.loss(logits := network(x), y)
                scaler.scale(loss / recipe.accumulate).backward()
            state.meter.update(loss, logits, leading_class(y))
            doubtful += loss.detach() / recipe.accumulate
        if recipe.clip_grad:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(state.trained, recipe.clip_grad)
            # With a scaler an overflowing gradient is in order: it skips the step and scales less.
            doubtful = doubtful if scaler.is_enabled() else doubtful + norm
        state.guard.before_update(doubtful, step, optimizer)
        scaler.step(optimizer)
        scaler.update()
        state.finish_step(batch.broken)
        if progress.advance():
            state.guard.check()
            progress.show(step_words(state.meter.means()), lr=f"{rule.lr_at(step):.4g}")
        stopping, saving = votes.cast(bool(stop), run.due(state.step))
        if stopping or saving:
            run.save(state.snapshot())
        if stopping:
            return False
    votes.settle()
    return True


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    meter: "ClassificationMeter",
    autocast: AutocastFactory,
    stop: Callable[[], bool] = lambda: False,
    real: RealMeter | None = None,
) -> dict[str, float] | None:
    """Returns mean loss and top-1/top-5 (in %) of `network` over all ranks' `batches`.

    Args:
        meter: an empty one, which may hold more than the figures for its caller.
        real: counts by other labels, too; the batches' targets are then the numbers of the images.

    Returns:
        {"loss", "top1", "top5", "images"}, or None when `stop()` said so before the end.
    """
    network.eval()
    for batch in batches:
        if stop():
            return None
        with autocast():
            logits = network(batch.images)
        targets = batch.targets if real is None else real.count(logits, batch.targets)
        meter.update(cross_entropy(logits, targets), logits, targets)
    return {**meter.means(), "images": meter.samples()}


def draw_first_batch(
    data: TrainingData,
    order: SeededBatches,
    rule: StepRule,
    aim: Objective,
    loader: Loader,
    skip: bool = False,
) -> bytes | None:
    """Draws the first images of a run's first batch as the network gets them, with their labels.

    Args:
        order: of the batches; it seeks the first one.
        loader: gives decoder and image layout; this process reads.
        skip: see `training_batches`.

    Returns:
        A PNG; None where an image cannot be read, which training will say.
    """
    order.seek(0)
    keys = next(iter(order))
    # Mixing pairs each image with the one before it, and the first with the last.
    few = [[*keys[-1:], *keys[:SHOWN]]]
    own = replace(loader, device=torch.device("cpu"), workers=0)
    try:
        (batch,) = training_batches(data.train, few, rule.recipe, order.seed, own, skip)()
    except UserError:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(rule.seed, 0))
        images, targets = aim.mix(batch.images, batch.targets)
    cells = []
    for image, target in zip(
        _as_pictures(images[1:], rule.recipe.preprocessing), targets[1:], strict=True
    ):
        shares = F.one_hot(target, len(data.classes)) if target.ndim == 0 else target
        lines = [
            plain_name(data.classes, i) + (f" {100 * shares[i]:.0f} %" if shares[i] < 1 else "")
            for i in shares.argsort(descending=True, stable=True).tolist()
            if shares[i] > 0
        ]
        cells.append(Cell(image, lines[0], "".join(lines[1:])))
    title = f"first batch, {len(cells)} of {len(keys)} images, {images.shape[2]} pixels"
    return draw_grid(cells, title, MEDIUM_CELL)


@torch.inference_mode()
def draw_predictions(
    network: nn.Module, images: ImageFolder, recipe: Recipe, amp: str, loader: Loader
) -> bytes | None:
    """Draws predictions on some validation images, evenly over the folder; wrong ones are framed.

    Returns:
        A PNG; None where an image cannot be read.
    """
    few = images.take(np.unique(np.linspace(0, len(images) - 1, SHOWN).round().astype(int)))
    cells = []
    network.eval()
    try:
        batches = list(validation_batches(few, recipe, replace(loader, workers=0))())
    except UserError:
        return None
    for batch in batches:
        with backends.autocast(loader.device, amp):
            shares = network(batch.images).float().softmax(1)
        classes = shares.argmax(1).tolist()
        targets, pictures = batch.targets.tolist(), _as_pictures(batch.images, recipe.preprocessing)
        for image, share, i, true in zip(pictures, shares.amax(1), classes, targets, strict=True):
            label = plain_name(images.classes, i) if i < len(images.classes) else f"class {i}"
            right = i == true and bool(share.isfinite())
            note = "" if right else f", true: {plain_name(images.classes, true)}"
            cells.append(
                Cell(image, label, f"{100 * share:.0f} %{note}", PLAIN if right else WRONG)
            )
    title = f"predictions on {len(cells)} of {len(images):,} validation images"
    return draw_grid(cells, title, MEDIUM_CELL)


def _as_pictures(images: torch.Tensor, look: Preprocessing) -> list[Image.Image]:
    """Returns normalised images (N, 3, S, S) as 8-bit ones again."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (look.mean, look.std))
    pixels = (255 * (images.cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).numpy()]


def count_correct(logits: torch.Tensor, targets: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """Counts how many of N samples have their class among the k highest logits.

    Args:
        logits: (N, C). With C < k every sample counts as correct.
        targets: (N,) int64 class indices.
        ks: the numbers k.

    Returns:
        (len(ks),) float64 counts. A row that is not finite is never correct: NaN sorts first in
        topk, which would make a ruined network look perfect for class 0.
    """
    _, hits = ranked(logits, targets, max(ks))
    return torch.stack([hits[:, :k].sum() for k in ks]).to(wide(logits.device))


def ranked(
    logits: torch.Tensor, targets: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `most` likely classes of N samples, or all C < most, and which is the true one.

    Args:
        logits, targets: see `count_correct`.

    Returns:
        (N, most) int64 classes, the most likely first; (N, most) bool, False in each row that is
        not finite.
    """
    top = logits.topk(min(most, logits.shape[1]), dim=1).indices
    return top, (top == targets[:, None]) & logits.isfinite().all(dim=1, keepdim=True)


class ClassificationMeter:
    """Sums loss, top-1 and top-5 over what `update` has seen.

    State: four sums (loss, top-1 hits, top-5 hits, samples) on the device, this rank's share. A
    further figure appends its own: earlier checkpoints hold those of their time.

    Args:
        classes: the network's outputs.
    """

    def __init__(self, device: torch.device, classes: int):
        self.classes = classes
        self.sums = torch.zeros(4, dtype=wide(device), device=device)

    @torch.no_grad()
    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a batch: its mean loss (scalar), logits (N, C) and targets (N,)."""
        n = len(targets)
        self.sums[0] += loss.detach() * n
        self.sums[1:3] += count_correct(logits.detach(), targets, (1, 5))
        self.sums[3] += n

    def means(self) -> dict[str, float]:
        """Returns FIGURES over all ranks: mean loss, and percentages. Call it on every rank."""
        loss, top1, top5, n = summed(self.sums).tolist()
        n = n or math.nan
        return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n}

    def samples(self) -> int:
        """Returns how many samples all ranks have seen. Call it on every rank."""
        return int(summed(self.sums)[3])


class RecallMeter(ClassificationMeter):
    """Sums as `ClassificationMeter` does, and by class what the mean of the recalls needs."""

    def __init__(self, device: torch.device, classes: int):
        super().__init__(device, classes)
        self.by_class = torch.zeros(2, classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a batch: its mean loss (scalar), logits (N, C) and targets (N,)."""
        super().update(loss, logits, targets)
        _, hits = ranked(logits, targets, 1)
        for row, labels in zip(self.by_class, (targets[hits[:, 0]], targets), strict=True):
            row += labels.bincount(minlength=self.classes)

    def means(self) -> dict[str, float]:
        """Returns FIGURES and the mean of the recalls in %, over the classes that have images."""
        right, images = summed(self.by_class)
        recalls = right.double()[images > 0] / images[images > 0]
        return {**super().means(), RECALL: 100 * recalls.mean().item()}


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the mean cross-entropy in float32, whatever the precision of the logits (N, C).

    Args:
        targets: (N,) class indices, or (N, C) shares of the classes.
        label_smoothing: share of each target that is divided evenly among the classes.
        class_weights: (C,) factors of the classes' terms; None for 1. The sum is divided by N, not
            by the weights of the batch: so each part of a batch, on any rank, counts by its size.
    """
    if class_weights is None:
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    total = F.cross_entropy(
        logits.float(), targets, class_weights, reduction="sum", label_smoothing=label_smoothing
    )
    return total / len(targets)


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> torch.Tensor:
    """Returns the mean binary cross-entropy over images and classes, in float32, as timm's.

    Args:
        logits: (N, C); each says of one class whether it is there (Beyer et al. 2020).
        targets, label_smoothing: as in `cross_entropy`.
        class_weights: (C,) factors of the classes' terms; None for 1.
        threshold: smoothed shares above it count as 1, and others as 0; 0 leaves them as they are.
    """
    classes = logits.shape[1]
    shares = targets if targets.ndim == 2 else F.one_hot(targets, classes)
    shares = (1 - label_smoothing) * shares.float() + label_smoothing / classes
    if threshold:
        shares = (shares > threshold).float()
    return F.binary_cross_entropy_with_logits(logits.float(), shares, class_weights)


def validation_columns(figures: Mapping[str, float]) -> dict[str, float]:
    """Returns what an epoch's row records of an evaluation; nothing where there was none."""
    return {f"val_{name}": value for name, value in figures.items() if name in (*FIGURES, RECALL)}


def score(row: Mapping[str, float], by: str) -> float:
    """Returns by which of an epoch's figures it is compared, the higher the better.

    Args:
        by: the recipe's `best_by`.

    Returns:
        -inf without an evaluation, or where its loss is no finite number.
    """
    if not math.isfinite(row.get("val_loss", math.nan)):
        return -math.inf
    return -row["val_loss"] if by == "loss" else row[f"val_{by}"]


def is_better(row: Mapping[str, float], best: Mapping[str, float], by: str) -> bool:
    """Returns whether an epoch is better than the best one so far, which is empty for none."""
    return score(row, by) > (score(best, by) if best else -math.inf)


def epochs_since_best(history: Sequence[Mapping[str, float]], by: str) -> int:
    """Returns how many epochs lie between the first one with the highest score and the last one
    that was evaluated; where none has a score, how many there are up to that one.
    """
    evaluated = [number for number, row in enumerate(history, 1) if "val_loss" in row]
    scores = [score(history[number - 1], by) for number in evaluated]
    if not evaluated or max(scores) == -math.inf:
        return max(evaluated, default=0)
    return evaluated[-1] - evaluated[scores.index(max(scores))]


def panels() -> list[Panel]:
    """Returns the diagrams of loss, top-1, top-5 and learning rate."""
    named = (
        ("Loss", "cross-entropy", "loss"),
        ("Top-1", "accuracy (%)", "top1"),
        ("Top-5", "accuracy (%)", "top5"),
    )
    pairs = [
        Panel(
            title,
            unit,
            (Curve(f"train_{key}", "train", MAIN), Curve(f"val_{key}", "val", SECOND)),
            "(last {:.2f})",
            can_be_log=key == "loss",
        )
        for title, unit, key in named
    ]
    rate = Curve("lr", None, GREY)
    return [*pairs, Panel("Learning rate", "at the epoch's first step", (rate,))]


def step_words(means: Mapping[str, float]) -> str:
    """Returns the words on an epoch under way."""
    return f"loss {means['loss']:.4f}  top-1 {means['top1']:.2f} %"


def accuracies(
    row: Mapping[str, float], classes: int, digits: int = 2, between: str = " ", part: str = "val_"
) -> str:
    """Returns the words on accuracy. With fewer than six classes top-5 is 100 %, and is left out.

    Args:
        part: what stands before the figures' names in `row`.
    """
    names = {"top1": "top-1", "top5": "top-5", RECALL: RECALL}
    shown = [name for name in names if part + name in row and (name != "top5" or classes > 5)]
    return between.join(f"{names[name]} {row[part + name]:.{digits}f} %" for name in shown)


def epoch_line(
    row: Mapping[str, float], epochs: int, speed: float, improved: bool, classes: int
) -> str:
    """Returns the line on a finished epoch, which may have had no evaluation."""
    parts = [
        f"epoch {row['epoch'] + 1}/{epochs}",
        f"train loss {row['train_loss']:.4f} top-1 {row['train_top1']:.2f} %",
        f"{speed:,.0f} images/s" + ("  (best)" if improved else ""),
    ]
    if "val_loss" in row:
        parts.insert(2, f"val loss {row['val_loss']:.4f} {accuracies(row, classes)}")
    return "  ".join(parts)


def best_words(best: Mapping[str, float], by: str, classes: int) -> str:
    """Returns the words on the best epoch for a run's closing line."""
    if not best:
        return "no epoch had a finite validation loss"
    loss = f"loss {best['val_loss']:.4f}, " if by == "loss" else ""
    figures = accuracies(best, classes, between=", ")
    return f"best {loss}{figures} (epoch {best['epoch'] + 1})"


def evaluation_lines(figures: dict[str, float], seconds: float, classes: int) -> list[str]:
    """Returns one line with the figures of an evaluation, and one for those by ReaL labels."""
    lines = [
        f"{counted(figures['images'], 'image', ',')}  "
        f"{accuracies(figures, classes, 3, '  ', '')}  loss {figures['loss']:.4f}  "
        f"{figures['images'] / seconds:,.0f} images/s"
    ]
    if "real_top1" in figures:
        lines.append(
            f"ReaL labels: {counted(figures['real_images'], 'image', ',')} with labels  "
            f"top-1 {figures['real_top1']:.3f} %"
        )
    return lines


def why_ended(state: TrainingState, recipe: Recipe) -> str | None:
    """Returns a line on a run that has no epoch left to do: all are done, or it ended early.

    None where there is one. That is no fault: a scheduler may start a finished run once more.
    """
    if state.epoch >= recipe.epochs:
        return f"{all_epochs(recipe.epochs)} done: give more with --epochs"
    waited = epochs_since_best(state.history, recipe.best_by)
    if recipe.early_stop and waited >= recipe.early_stop:
        return (
            f"stopped early, after {state.epoch} of {counted(recipe.epochs, 'epoch')}: "
            f"{waited} without a better {recipe.best_by.replace('top1', 'top-1')}; to go on, give "
            "more with --early-stop, or 0 for all epochs"
        )
    return None


def unmixed(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch as it is."""
    return images, targets


def make_mix(mixup: float, cutmix: float, num_classes: int) -> Mix:
    """Returns a function (images (N, 3, S, S), targets (N,)) → (mixed images, shares (N,
    num_classes)).

    torchvision's transforms do it. They pair each image with the one before it and draw one share
    for the whole batch, from torch's default CPU generator: seeded by the step, a batch is mixed
    the same way whenever it comes, and nothing waits for the device.

    Args:
        mixup, cutmix: alpha of each Beta distribution; 0 leaves that one out, both at 0 all of it,
            and with both a batch takes one of them by even chance.
    """
    if not mixup and not cutmix:
        return unmixed
    from torchvision.transforms import v2  # slow to import, and few runs need it

    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha
    ]
    mix: Mix = v2.RandomChoice(kinds)
    return mix


def leading_class(targets: torch.Tensor) -> torch.Tensor:
    """Returns (N,) classes; of shares (N, C), as mixing makes them, those with the largest."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)

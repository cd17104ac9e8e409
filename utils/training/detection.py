"""Trains a detector for an epoch, evaluates it, and measures both: losses, and COCO's figures.

The same shape as `utils.training.classification`; the step is a detector's own: a dict of losses, a
clipped gradient, images of several sizes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from utils.data.coco_eval import FIGURES, KINDS, Result, Summary, evaluate_ranks, to_results
from utils.data.sampler import mix_seed
from utils.runs.writer import Curve, Panel, Row, RunFiles
from utils.system.backends import AutocastFactory
from utils.system.distributed import Context, Votes
from utils.system.signals import StopRequest
from utils.training.detection_data import DetectionBatch, ValidationSet
from utils.training.optim import StepRule
from utils.training.progress import Progress
from utils.training.state import TrainingState, summed, wide

TITLES = {"box": "Boxes", "mask": "Masks"}
IMAGES = 10  # steps of an evaluation, of one image each, for one of training
Summaries = dict[str, Summary]  # of "bbox", and of "segm" where masks are evaluated


def train_one_epoch(
    state: TrainingState,
    network: nn.Module,
    batches: Iterable[DetectionBatch],
    rule: StepRule,
    progress: Progress,
    run: RunFiles,
    votes: Votes,
    stop: StopRequest,
) -> bool:
    """Trains on `batches`, the rest of the epoch in which `state` stands, saving where due.

    Args:
        network: `state.network`, a torchvision detector, bare or in DistributedDataParallel.

    Returns:
        Whether the epoch is done. False: the run was asked to stop, and is saved.

    Raises:
        UserError: exit code 3, when loss or gradient is not finite (see NonFiniteGuard).
    """
    network.train()
    optimizer, scaler = state.optimizer, state.scaler
    first = state.epoch * rule.steps_per_epoch  # the epoch's first step, counted over the run
    for batch in batches:
        torch.manual_seed(mix_seed(rule.seed, step := first + state.step))
        state.set_lr(rule.lr_at(step))
        with rule.autocast():
            losses = network(batch.images, batch.targets)
            loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(state.trained, rule.recipe.clip)
        # With a scaler an overflowing gradient is in order: it skips the step and scales less.
        doubtful = loss.detach() if scaler.is_enabled() else loss.detach() + norm
        state.guard.before_update(doubtful, step, optimizer)
        scaler.step(optimizer)
        scaler.update()
        state.meter.update(losses)
        state.finish_step(batch.broken)
        if progress.advance():
            state.guard.check()
            means = state.meter.means()
            progress.show(step_words(means), step_details(means), f"{rule.lr_at(step):.3g}")
        stopping, saving = votes.cast(bool(stop), run.due(state.step))
        if stopping or saving:
            run.save(state.snapshot())
        if stopping:
            return False
    votes.settle()
    return True


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
            predictions = network(batch.images)
        for image_id, detections in zip(batch.image_ids, predictions, strict=True):
            results += to_results(detections, image_id, category_ids, first_label)
    return results


def evaluate(
    network: nn.Module,
    batches: Iterable[DetectionBatch],
    val: ValidationSet,
    first_label: int,
    autocast: AutocastFactory,
    context: Context,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Sequence[Result], Summaries] | None:
    """Evaluates a detector on the validation images, each once over all ranks.

    Args:
        batches: this rank's images.
        first_label: of the network's classes.

    Returns:
        The detections of all ranks in COCO's format, on rank 0 alone, and COCO's figures; None when
        `stop()` said so before the end.
    """
    results = detect(network, batches, val.category_ids, first_label, autocast, stop)
    if results is None:
        return None
    gathered, summaries = evaluate_ranks(results, val.truth, context)
    return gathered or (), summaries


class LossMeter:
    """Sums a detector's losses on the device, and gives their means.

    State: a sum for each name and the number of steps, this rank's share.
    """

    def __init__(self, device: torch.device, names: Sequence[str]):
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names) + 1, dtype=wide(device), device=device)

    @torch.no_grad()
    def update(self, losses: dict[str, torch.Tensor]) -> None:
        values = [losses[name].detach().to(self.sums.dtype) for name in self.names]
        self.sums += torch.stack([*values, torch.ones_like(values[0])])

    def means(self) -> dict[str, float]:
        """Returns the mean of each loss, and of their sum as "loss", over all ranks' steps.

        Call it on every rank.
        """
        *sums, steps = summed(self.sums).tolist()
        means = [value / (steps or float("nan")) for value in sums]
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True))}


def validation_columns(summaries: Mapping[str, Summary]) -> dict[str, float]:
    """Returns {"box_AP": …, "mask_AP": …} and the eleven others of each, in %; -1 stays."""
    return {
        f"{KINDS[kind]}_{name}": 100 * value if value >= 0 else value
        for kind, summary in summaries.items()
        for name, value in summary.figures.items()
    }


def best_details(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Returns what the best epoch records besides its row: the APs of its classes, too."""
    return {"summaries": {kind: asdict(summary) for kind, summary in summaries.items()}}


def score(row: Mapping[str, float]) -> float:
    """Returns the AP of masks, or of boxes where there is none of masks, in %.

    Without any it is below 0 and grows with the epoch, so that the last epoch is the best. Of an
    epoch without an evaluation it is -inf.
    """
    if "box_AP" not in row:
        return -math.inf
    counted = [value for value in (row.get("mask_AP", -1.0), row["box_AP"]) if value >= 0]
    return counted[0] if counted else -1 / (1 + row["epoch"])


def is_better(row: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Returns whether an epoch's score is above the best one's; `best` is empty for none."""
    return score(row) > (score(best) if best else -math.inf)


def panels(history: Sequence[Row]) -> list[Panel]:
    """Returns the diagrams of losses, box AP, mask AP where there is one, and learning rate."""
    losses = [name for name in history[-1] if name.startswith("train_")]
    curves = tuple(Curve(name, name.removeprefix("train_")) for name in losses)
    diagrams = [Panel("Training losses", "mean of an epoch", curves, can_be_log=True)]
    diagrams += [
        Panel(TITLES[kind], "AP (%)", tuple(Curve(f"{kind}_{n}", n) for n in FIGURES[:6]))
        for kind in KINDS.values()
        if any(f"{kind}_AP" in row for row in history)
    ]
    return [*diagrams, Panel("Learning rate", "at the epoch's last step", (Curve("lr", "lr"),))]


def step_words(means: Mapping[str, float]) -> str:
    """Returns the words on an epoch under way."""
    return f"loss {means['loss']:.3f}"


def step_details(means: Mapping[str, float]) -> str:
    """Returns the parts of the loss, in brackets."""
    parts = [f"{k.removeprefix('loss_')} {v:.3f}" for k, v in means.items() if k != "loss"]
    return f"({', '.join(parts)})"


def in_percent(value: float) -> str:
    """Returns a figure in % with one digit; "-" where there was no such object."""
    return f"{value:.1f}" if value >= 0 else "-"


def precision_words(row: Mapping[str, float]) -> str:
    """Returns AP and AP50 of boxes, and of masks where there are any."""
    return "  ".join(
        f"{kind} AP {in_percent(row[f'{kind}_AP'])} AP50 {in_percent(row[f'{kind}_AP50'])}"
        for kind in KINDS.values()
        if f"{kind}_AP" in row
    )


def epoch_line(row: Row, epochs: int, speed: float, improved: bool) -> str:
    """Returns the line on a finished epoch, which may have had no evaluation."""
    val = f"  val {precision_words(row)}" if "box_AP" in row else ""
    return (
        f"epoch {row['epoch'] + 1}/{epochs}  train loss {row['train_loss']:.4f}{val}  "
        f"{speed:,.1f} images/s" + ("  (best)" if improved else "")
    )


def best_words(best: Mapping[str, Any]) -> str:
    """Returns the words on the best epoch for a run's closing line."""
    return f"best {precision_words(best)} (epoch {best['epoch'] + 1})"


def summary_lines(summaries: dict[str, Summary]) -> list[str]:
    """Returns COCO's figures and every class's AP, in %; "-" where there was no such object."""
    lines = ["       " + "".join(f"{name:>7}" for name in FIGURES)]
    for kind, summary in summaries.items():
        values = "".join(f"{in_percent(100 * value):>7}" for value in summary.figures.values())
        lines.append(f"{KINDS[kind]:<7}{values}")
    names = list(next(iter(summaries.values())).per_class)
    width = max(map(len, names))
    heads = "".join(f"{KINDS[kind] + ' AP':>9}" for kind in summaries)
    lines.append(f"{'class':<{width}}{heads}")
    for name in names:
        values = "".join(f"{in_percent(100 * s.per_class[name]):>9}" for s in summaries.values())
        lines.append(f"{name:<{width}}{values}")
    return lines


def best_lines(best: dict[str, Any]) -> list[str]:
    """Returns `summary_lines` of the best epoch, under its number."""
    if "summaries" not in best:  # of a run that an earlier version began
        return []
    summaries = {kind: Summary(**fields) for kind, fields in best["summaries"].items()}
    return [f"epoch {best['epoch'] + 1}, the best:", *summary_lines(summaries)]

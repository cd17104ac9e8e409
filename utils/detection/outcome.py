"""Says how a detector's run is measured: by COCO's figures of boxes and masks.

The best epoch has the highest AP, of masks where there are any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from utils.detection.coco_evaluation import FIGURES, Summary
from utils.detection.coco_truth import KINDS
from utils.training.outcome import Curve, Outcome, Panel, Row
from utils.training.progress import StepWords

TITLES = {"box": "Boxes", "mask": "Masks"}


def val_columns(summaries: Mapping[str, Summary]) -> dict[str, float]:
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
    """Returns the AP of masks, or of boxes where no mask could be judged, in %.

    Where nothing could be judged it is below 0 and grows with the epoch: the last is the best then.
    """
    judged = [value for value in (row.get("mask_AP", -1.0), row["box_AP"]) if value >= 0]
    return judged[0] if judged else -1 / (1 + row["epoch"])


def panels(history: Sequence[Row]) -> list[Panel]:
    """Returns the diagrams of losses, box AP, mask AP where there is one, and learning rate."""
    losses = [name for name in history[-1] if name.startswith("train_")]
    found = [
        Panel(
            "Training losses",
            "mean of an epoch",
            tuple(Curve(name, name.removeprefix("train_")) for name in losses),
            can_be_log=True,
        )
    ]
    found += [
        Panel(TITLES[kind], "AP (%)", tuple(Curve(f"{kind}_{n}", n) for n in FIGURES[:6]))
        for kind in KINDS.values()
        if f"{kind}_AP" in history[-1]
    ]
    return [*found, Panel("Learning rate", "at the epoch's last step", (Curve("lr", "lr"),))]


def step_details(means: Mapping[str, float]) -> str:
    """Returns the parts of the loss, in brackets."""
    parts = [f"{k.removeprefix('loss_')} {v:.3f}" for k, v in means.items() if k != "loss"]
    return f"({', '.join(parts)})"


def in_percent(value: float) -> str:
    """Returns a figure in % with one digit; "-" where nothing was to be found."""
    return f"{value:.1f}" if value >= 0 else "-"


def precision_words(row: Mapping[str, float]) -> str:
    """Returns AP and AP50 of boxes, and of masks where there are any."""
    return "  ".join(
        f"{kind} AP {in_percent(row[f'{kind}_AP'])} AP50 {in_percent(row[f'{kind}_AP50'])}"
        for kind in KINDS.values()
        if f"{kind}_AP" in row
    )


def epoch_line(row: Row, epochs: int, speed: float, improved: bool) -> str:
    """Returns the line on a finished epoch."""
    return (
        f"epoch {row['epoch'] + 1}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"val {precision_words(row)}  {speed:,.1f} images/s" + ("  (best)" if improved else "")
    )


def result(best: Mapping[str, Any]) -> str:
    """Returns the words on the best epoch for a run's closing line."""
    return f"best {precision_words(best)} (epoch {best['epoch'] + 1})"


DETECTION = Outcome(
    columns=lambda history: list(history[-1]),
    panels=panels,
    validated=val_columns,
    best_details=best_details,
    score=score,
    lr_at_end=True,
    step_words=StepWords(
        lambda means: f"loss {means['loss']:.3f}", step_details, lr_digits=3, speed_decimals=1
    ),
    epoch_line=epoch_line,
    result=result,
)

"""Says how a classifier's run is measured: loss, top-1, top-5. The best has the highest top-1."""

import math
from collections.abc import Mapping, Sequence

from utils.system.colours import GREY, MAIN, SECOND
from utils.training.outcome import Curve, Outcome, Panel, Row
from utils.training.progress import StepWords

FIGURES = ("loss", "top1", "top5")
COLUMNS = (
    "epoch",
    "lr",
    *(f"train_{name}" for name in FIGURES),
    *(f"val_{name}" for name in FIGURES),
)


def score(row: Mapping[str, float]) -> float | None:
    """Returns the validation's top-1 in %, or None where its loss is not a finite number."""
    return row["val_top1"] if math.isfinite(row["val_loss"]) else None


def panels(history: Sequence[Row]) -> list[Panel]:
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
            (
                Curve(f"train_{key}", "train", MAIN),
                Curve(f"val_{key}", "val", SECOND),
            ),
            "(last {:.2f})",
            can_be_log=key == "loss",
        )
        for title, unit, key in named
    ]
    rate = Curve("lr", None, GREY)
    return [*pairs, Panel("Learning rate", "at the epoch's first step", (rate,))]


def epoch_line(row: Row, epochs: int, speed: float, improved: bool) -> str:
    """Returns the line on a finished epoch."""
    return (
        f"epoch {row['epoch'] + 1}/{epochs}  train loss {row['train_loss']:.4f} "
        f"top-1 {row['train_top1']:.2f} %  val loss {row['val_loss']:.4f} "
        f"top-1 {row['val_top1']:.2f} % top-5 {row['val_top5']:.2f} %  {speed:,.0f} images/s"
        + ("  (best)" if improved else "")
    )


def result(best: Mapping[str, float]) -> str:
    """Returns the words on the best epoch for a run's closing line."""
    if not best:
        return "no epoch had a finite validation loss"
    return (
        f"best top-1 {best['val_top1']:.2f} %, top-5 {best['val_top5']:.2f} % "
        f"(epoch {best['epoch'] + 1})"
    )


CLASSIFICATION = Outcome(
    columns=lambda history: COLUMNS,
    panels=panels,
    validated=lambda figures: {f"val_{name}": figures[name] for name in FIGURES},
    best_details=lambda figures: {},
    score=score,
    lr_at_end=False,
    step_words=StepWords(
        lambda means: f"loss {means['loss']:.4f}  top-1 {means['top1']:.2f} %", lr_digits=4
    ),
    epoch_line=epoch_line,
    result=result,
)

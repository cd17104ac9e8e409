"""Says how a kind of network is measured, as one value that the loop, the log and the terminal use.

utils.classification.outcome and utils.detection.outcome each make one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.training.progress import StepWords

Row = dict[str, float]  # one finished epoch: "epoch", "lr", train_… and what was validated


@dataclass(frozen=True)
class Curve:
    """Describes one line of a panel: a column of the history.

    Args:
        label: in the legend; None for no legend.
        colour: of matplotlib; None for the next one of its cycle.
    """

    column: str
    label: str | None
    colour: str | None = None


@dataclass(frozen=True)
class Panel:
    """Describes one diagram of curves.png. `last` shows a curve's last value in its label."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    last: str = "({:.3g})"
    can_be_log: bool = False  # a loss: logarithmic where it spans much


@dataclass(frozen=True)
class Outcome:
    """Holds what differs between classification and detection in a run's record.

    Args:
        columns: history → names of the columns of metrics.csv, "epoch" first.
        panels: history → the diagrams of curves.png, four at most.
        validated: what an evaluation returned → its columns.
        best_details: what an evaluation returned → what the best epoch keeps besides its row.
        score: row → the number that is highest in the best epoch; None for a row that is never it.
        lr_at_end: whether a row's learning rate is that of the epoch's last step, not its first.
        step_words: how progress within an epoch is said.
        epoch_line: (row, epochs of the run, images per second, is the best) → one line.
        result: the best epoch's row → the closing line's words.
    """

    columns: Callable[[Sequence[Row]], Sequence[str]]
    panels: Callable[[Sequence[Row]], Sequence[Panel]]
    validated: Callable[[Any], Row]
    best_details: Callable[[Any], dict[str, Any]]
    score: Callable[[Mapping[str, float]], float | None]
    lr_at_end: bool
    step_words: StepWords
    epoch_line: Callable[[Row, int, float, bool], str]
    result: Callable[[Mapping[str, Any]], str]

"""Writes a run's record: metrics.csv, TensorBoard events, curves.png, lines of progress."""

import csv
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from utils.runs.event_file import EventFile
from utils.system.colours import GREY
from utils.system.errors import UserError
from utils.system.files import write_atomically

DECADES = 20  # times: a span of losses from which on the axis is logarithmic


class CurveLike(Protocol):
    """Describes one line of a diagram, see `utils.training.outcome.Curve`."""

    @property
    def column(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def colour(self) -> str | None: ...


class PanelLike(Protocol):
    """Describes one diagram, see `utils.training.outcome.Panel`."""

    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def curves(self) -> Sequence[CurveLike]: ...
    @property
    def last(self) -> str: ...
    @property
    def can_be_log(self) -> bool: ...


class Figures(Protocol):
    """Describes what is recorded of an epoch, see `utils.training.outcome.Outcome`."""

    @property
    def columns(self) -> Callable[[Sequence[dict[str, float]]], Sequence[str]]: ...
    @property
    def panels(self) -> Callable[[Sequence[dict[str, float]]], Sequence[PanelLike]]: ...
    @property
    def result(self) -> Callable[[dict[str, float]], str]: ...
    @property
    def score(self) -> Callable[[dict[str, float]], float | None]: ...


class RunLogger:
    """Writes one row per epoch, always from the run's whole history.

    metrics.csv and curves.png are functions of that history, which the checkpoint holds: after an
    interruption they are neither short of a row nor have one twice. Wall-clock figures, which no
    two runs share, go to TensorBoard alone.

    Epochs count from 1 there, as people count, and from 0 in the history.

    Args:
        figures: which columns and diagrams there are.
        first_epoch: of this process; from 0; TensorBoard forgets older events from there on.
    """

    def __init__(self, folder: Path, figures: Figures, title: str, first_epoch: int = 0):
        self.folder, self.figures, self.title = folder, figures, title
        self.is_new = not any(folder.glob("events.out.tfevents.*"))  # also of a run that goes on
        self.warned: set[str] = set()  # files that could not be written, as has been said
        self.events = EventFile(folder, first_epoch)
        with self._said_once("TensorBoard's events"):
            self.events.open()

    def log(self, history: list[dict[str, float]], images_per_second: float) -> None:
        """Writes all files anew; the last row of `history` is the epoch just finished.

        One that cannot be written ends no run: the checkpoints hold the same figures. The next
        epoch tries it again.
        """
        columns = self.figures.columns(history)
        with self._said_once("metrics.csv"):
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "epoch": int(row["epoch"]) + 1} for row in history)
            write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        with self._said_once("TensorBoard's events"):
            rows = history if self.is_new else history[-1:]
            self.events.add(rows, columns[1:], images_per_second)
        self.is_new = False
        with self._said_once("curves.png"):
            panels = self.figures.panels(history)
            scored = [(self.figures.score(row), row) for row in history]
            known = [(score, -int(row["epoch"])) for score, row in scored if score is not None]
            best = -max(known)[1] if known else None
            draw_curves(history, panels, self.folder / "curves.png", self.title, best)

    @contextmanager
    def _said_once(self, name: str) -> Iterator[None]:
        """Turns a fault of the file system into a line on stderr, the first time for `name`."""
        try:
            yield
        except (OSError, UserError) as error:
            if name not in self.warned:
                self.warned.add(name)
                print(
                    f"! {self.folder}: {name} could not be written ({error}); the run goes on, and "
                    "its checkpoints hold the same figures",
                    file=sys.stderr,
                    flush=True,
                )

    def close(self) -> None:
        with self._said_once("TensorBoard's events"):
            self.events.close()


def draw_curves(
    history: list[dict[str, float]],
    panels: Sequence[PanelLike],
    path: Path,
    title: str,
    best: int | None = None,
) -> None:
    """Draws up to four panels over epochs, as one PNG. Values below 0 stand for "none".

    Args:
        best: the epoch, from 0, that is marked as the best.
    """
    from matplotlib.ticker import MaxNLocator

    from utils.system.picture_style import plt, png, styled

    with styled():
        figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
        for axis, panel in zip(axes.flat, panels, strict=False):
            shown = [
                value
                for curve in panel.curves
                for value in _draw_curve(axis, panel, curve, history)
            ]
            axis.set(title=panel.title, ylabel=panel.unit, xlabel="Epoch")
            if panel.can_be_log and shown and min(shown) > 0 and max(shown) > DECADES * min(shown):
                axis.set_yscale("log")  # one high value would flatten all the others
            if best is not None:
                axis.axvline(best + 1, color=GREY, linestyle=":", zorder=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if any(axis.get_legend_handles_labels()):
                axis.legend()
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        note = "" if best is None else f"\ndotted: the best epoch, {best + 1}"
        figure.suptitle(title + note)
        write_atomically(path, png(figure))


def _draw_curve(
    axis: Any, panel: PanelLike, curve: CurveLike, history: Sequence[dict[str, float]]
) -> list[float]:
    """Draws one column of the history, and returns its finite values."""
    points = [(row["epoch"] + 1, row[curve.column]) for row in history]
    points = [point for point in points if not point[1] < 0]  # keeps what is no number
    if points:
        label = curve.label and f"{curve.label} {panel.last.format(points[-1][1])}"
        axis.plot(*zip(*points, strict=True), "o-", ms=3, color=curve.colour, label=label)
    return [value for _, value in points if math.isfinite(value)]

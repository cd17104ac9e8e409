"""What a detection run remembers and leaves to look at, by the same means as a classification run.

The state that resumes, the run folder's one writer, metrics.csv and curves.png: each takes from
its counterpart all that does not know what is measured.
"""

import io
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.classification.state import TrainState
from utils.detection.coco_evaluation import FIGURES, Summary
from utils.detection.engine import LossMeter
from utils.runs.commands import command, look_line
from utils.runs.metrics_log import RunLogger
from utils.runs.writer import RunFiles
from utils.system.files import write_atomically
from utils.training.progress import Progress, duration

KINDS = {"bbox": "box", "segm": "mask"}  # COCO's words, and the columns'


def val_columns(summaries: dict[str, Summary]) -> dict[str, float]:
    """{"box_AP": …, "mask_AP": …} and the eleven others of each, in %; -1 stays."""
    return {
        f"{KINDS[kind]}_{name}": 100 * value if value >= 0 else value
        for kind, summary in summaries.items()
        for name, value in summary.figures.items()
    }


@dataclass
class DetectionState(TrainState):
    """Where a detection run stands. The best epoch has the highest AP, of masks where there are."""

    meter: LossMeter

    def begin(self, epoch: int) -> None:
        """Moves to the first step of `epoch`, with an empty meter and no rows from it on."""
        self.epoch, self.step = epoch, 0
        self.history = [row for row in self.history if row["epoch"] < epoch]
        self.meter = LossMeter(self.meter.sums.device, self.meter.names)

    def finish_epoch(self, lr: float, summaries: dict[str, Summary]) -> bool:
        """Writes the epoch into the history and moves on. Call on every rank.

        Args:
            lr: at the epoch's last step, when a warm-up is over.
            summaries: of the evaluation; the best epoch's stay, with the APs of its classes.

        Returns:
            Whether its AP is the best so far.
        """
        means = self.meter.means(self.meter.total())
        row = {"epoch": self.epoch, "lr": lr}
        row |= {f"train_{name}": value for name, value in means.items()} | val_columns(summaries)
        self.history.append(row)
        improved = main_figure(row) > (main_figure(self.best) if self.best else -2.0)
        if improved:
            kept = {kind: asdict(summary) for kind, summary in summaries.items()}
            self.best = {**row, "summaries": kept}
        self.begin(self.epoch + 1)
        return improved


def main_figure(row: dict[str, float]) -> float:
    return row.get("mask_AP", row["box_AP"])


class DetectionFiles(RunFiles):
    """The run folder's writer, with a detector's columns."""

    def _open_logger(self, title: str, first_epoch: int) -> "DetectionLogger":
        return DetectionLogger(self.folder, title, first_epoch)

    def farewell(self, best: dict, data: str) -> list[str]:
        """Closing lines: the result, and the commands that a user wants next."""
        if self.folder is None:
            return []
        weights = self.checkpoints.best
        figures = "  ".join(
            f"{kind} AP {best[f'{kind}_AP']:.1f} AP50 {best[f'{kind}_AP50']:.1f}"
            for kind in KINDS.values()
            if f"{kind}_AP" in best
        )
        return [
            f"done: best {figures} (epoch {best['epoch'] + 1})",
            f"  evaluate:    {command('-e', '--resume', weights, data)}",
            look_line(self.folder),
            f"  train on:    {command('--resume', self.checkpoints.last, '--epochs', 'N')}",
        ]


class DetectionLogger(RunLogger):
    """The same files, with a column for every figure of a detector."""

    def columns(self, history: list[dict[str, float]]) -> list[str]:
        return list(history[-1])

    def draw(self, history: list[dict[str, float]]) -> None:
        draw_curves(history, self.folder / "curves.png", self.title)


def draw_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Losses, box AP, mask AP where there is one, and learning rate over epochs, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] + 1 for row in history]
    kinds = [kind for kind in KINDS.values() if f"{kind}_AP" in history[-1]]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    losses = [name for name in history[-1] if name.startswith("train_")]
    panels = [("Training losses", "mean of an epoch", losses)]
    panels += [
        (
            f"{kind.capitalize()}es" if kind == "box" else "Masks",
            "AP (%)",
            [f"{kind}_{name}" for name in FIGURES[:6]],
        )
        for kind in kinds
    ]
    panels.append(("Learning rate", "at the epoch's last step", ["lr"]))
    for axis, (name, unit, columns) in zip(axes.flat, panels, strict=False):
        for column in columns:
            points = [(e, row[column]) for e, row in zip(epochs, history, strict=True)]
            points = [point for point in points if point[1] >= 0]  # -1: no such objects
            label = column.removeprefix("train_").removeprefix("box_").removeprefix("mask_")
            if points:
                label += f" ({points[-1][1]:.3g})"
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        axis.set(title=name, ylabel=unit, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


class DetectionProgress(Progress):
    """Progress with a detector's losses."""

    def show(self, figures: dict[str, float], lr: float) -> None:
        """Shows the losses so far in the epoch, with the speed since the last time."""
        now = time.perf_counter()
        speed = (self.step - self.since_step) * self.images / max(now - self.since, 1e-9)
        self.since, self.since_step = now, self.step
        if self.quiet:
            return
        total = f"loss {figures['loss']:.3f}"
        parts = [f"{k.removeprefix('loss_')} {v:.3f}" for k, v in figures.items() if k != "loss"]
        parts = f"({', '.join(parts)})"
        if self.bar is not None:  # the parts last, where a narrow terminal has no room for them
            text = f"{total}  {speed:,.1f} images/s  ETA {{remaining}}  {parts}"
            self.bar.bar_format = self.bar_format(text)
            self.bar.refresh()
            return
        left = (now - self.started) / (self.step - self.first) * (self.total - self.step)
        print(
            f"{self.title}  step {self.step:>{len(str(self.total))}}/{self.total}  "
            f"{total} {parts}  lr {lr:.3g}  {speed:,.1f} images/s  ETA {duration(left)}",
            flush=True,
        )

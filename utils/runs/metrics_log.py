"""What a run leaves to look at: metrics.csv, TensorBoard events, curves.png, lines of progress."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.system.files import write_atomically

COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "train_top5",
    "val_loss",
    "val_top1",
    "val_top5",
)


class RunLogger:
    """Writes one row per epoch, always from the run's whole history.

    metrics.csv and curves.png are functions of that history, which the checkpoint holds: after an
    interruption they are neither short of a row nor have one twice. Wall-clock figures, which no
    two runs share, go to TensorBoard alone.

    Args:
        first_epoch: of this process; TensorBoard forgets older events from there on.
    """

    def __init__(self, folder: Path, title: str, first_epoch: int = 0):
        self.folder, self.title = folder, title
        self.is_new = not any(folder.glob("events.out.tfevents.*"))  # also of a run that goes on
        self.board = SummaryWriter(str(folder), purge_step=first_epoch or None)

    def log(self, history: list[dict[str, float]], images_per_second: float) -> None:
        """Writes everything anew; the last row of `history` is the epoch just finished."""
        text, columns = io.StringIO(), self.columns(history)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        for row in history if self.is_new else history[-1:]:
            for name in columns[1:]:
                self.board.add_scalar(name.replace("_", "/", 1), row[name], row["epoch"])
        self.is_new = False
        self.board.add_scalar("train/images_per_second", images_per_second, row["epoch"])
        self.board.flush()
        self.draw(history)

    def columns(self, history: list[dict[str, float]]) -> Sequence[str]:
        """Of metrics.csv, "epoch" first."""
        return COLUMNS

    def draw(self, history: list[dict[str, float]]) -> None:
        draw_curves(history, self.folder / "curves.png", self.title)

    def close(self) -> None:
        self.board.close()


def draw_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Loss, top-1, top-5 and learning rate over epochs, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] + 1 for row in history]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels = (
        ("Loss", "cross-entropy", "loss"),
        ("Top-1", "accuracy (%)", "top1"),
        ("Top-5", "accuracy (%)", "top5"),
    )
    for axis, (name, unit, key) in zip(axes.flat, panels, strict=False):
        for part, colour in (("train", "tab:blue"), ("val", "tab:orange")):
            values = [row[f"{part}_{key}"] for row in history]
            label = f"{part} (last {values[-1]:.2f})" if values else part
            axis.plot(epochs, values, "o-", markersize=3, color=colour, label=label)
        axis.set(title=name, ylabel=unit)
        axis.legend()
    axes.flat[3].plot(epochs, [row["lr"] for row in history], "o-", markersize=3, color="tab:green")
    axes.flat[3].set(title="Learning rate", ylabel="at the epoch's first step")
    for axis in axes.flat:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())

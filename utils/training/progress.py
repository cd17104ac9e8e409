"""Shows the progress of an epoch: a bar on a terminal, lines elsewhere."""

import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from utils.system.distributed import Context
from utils.training.state import TrainingState

Item = TypeVar("Item")
ALONE = Context(torch.device("cpu"))
UNKNOWN = "?"  # a time left, before anything has told it


@dataclass
class Pace:
    """How quick a run has been so far in this process; one for all of its epochs.

    Attributes:
        step: seconds of a training step; None until one is known. The process's first step does
            not count: it compiles, allocates and starts the loader workers.
        between: seconds between two epochs (evaluation and files); 0 until the first is over. The
            shortest is taken, as the first evaluation compiles, too.
    """

    step: float | None = None
    between: float = 0.0

    def note_between(self, seconds: float) -> None:
        """Takes in the seconds from the end of an epoch's steps to the next epoch's beginning."""
        self.between = min(seconds, self.between or seconds)


class Progress:
    """Shows a bar on a terminal; elsewhere a line every `every` steps.

    Args:
        title: such as "epoch 3/8".
        total: steps of the epoch, of which `done` lie behind.
        images: in one step, over all ranks.
        decimals: of images per second.
        context: the run's ranks; rank 0 alone speaks.
        pace: of the run; None for an evaluation with nothing before it.
        epochs_left: epochs of the run after this one; 0 shows no time for the run.
    """

    def __init__(
        self,
        title: str,
        total: int,
        images: int,
        every: int,
        *,
        decimals: int = 0,
        done: int = 0,
        context: Context = ALONE,
        pace: Pace | None = None,
        epochs_left: int = 0,
    ):
        self.decimals, self.context = decimals, context
        self.title, self.total, self.images, self.every = title, total, images, every
        self.step = done
        self.since = self.started = self.last = time.perf_counter()
        self.since_step = self.first = done
        self.pace, self.epochs_left = pace or Pace(), epochs_left
        self.skips_one = self.pace.step is None  # this process has not compiled yet
        self.seconds, self.counted = 0.0, 0  # of the steps that tell how long others will take
        self.has_bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            disable=not (self.has_bar and context.is_main),
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}",
        )

    def advance(self) -> bool:
        """Counts a step; returns True when figures are due for `show`."""
        self.step += 1
        now = time.perf_counter()
        if self.skips_one:
            self.skips_one = False
        else:
            self.seconds += now - self.last
            self.counted += 1
            self.pace.step = self.seconds / self.counted
        self.last = now
        self.bar.update()
        return self.step % self.every == 0 or self.step == self.total

    def show(self, figures: str = "", details: str = "", lr: str = "") -> None:
        """Shows words on the epoch so far, with the speed since the last time.

        Args:
            figures: those that count most; an evaluation has none yet.
            details: further ones, which a bar shows last.
            lr: the learning rate.
        """
        now = time.perf_counter()
        speed = (self.step - self.since_step) * self.images / max(now - self.since, 1e-9)
        self.since, self.since_step = now, self.step
        rate = f"{speed:,.{self.decimals}f} images/s"
        times = ", ".join(self.times_left())
        if self.has_bar:  # the times first: a narrow terminal cuts what stands last
            self.bar.set_postfix_str("  ".join(filter(None, [times, figures, rate, details])))
            return
        parts = [
            self.title,
            f"step {self.step:>{len(str(self.total))}}/{self.total}",
            f"{figures} {details}".strip(),
            lr and f"lr {lr}",
            rate,
            times,
        ]
        self.context.say("  ".join(filter(None, parts)))

    def times_left(self) -> list[str]:
        """Says how long the epoch will take yet, and the run where it has further epochs."""
        step, left = self.pace.step, self.total - self.step
        epoch = 0.0 if left == 0 else None if step is None else step * left
        times = [f"ETA {UNKNOWN if epoch is None else duration(epoch)}"]
        if self.epochs_left:
            run = UNKNOWN
            if step is not None:
                steps = left + self.epochs_left * self.total
                run = duration(step * steps + (self.epochs_left + 1) * self.pace.between)
            times.append(f"run {run}")
        return times

    def close(self) -> float:
        """Ends the bar and returns the mean images per second of the steps it saw."""
        self.bar.close()
        steps = self.step - self.first
        return steps * self.images / max(time.perf_counter() - self.started, 1e-9)


def epoch_progress(
    state: TrainingState,
    recipe: Any,
    steps: int,
    every: int,
    pace: Pace,
    context: Context,
    decimals: int = 0,
) -> Progress:
    """Makes the progress of the epoch under way, from the step on at which `state` stands.

    Args:
        recipe: of either kind: it gives the epochs, and the images of a step over all ranks.
        steps: of the epoch.
        every: steps between two lines.
    """
    return Progress(
        f"epoch {state.epoch + 1}/{recipe.epochs}",
        steps,
        recipe.batch_size,
        every,
        decimals=decimals,
        done=state.step,
        context=context,
        pace=pace,
        epochs_left=recipe.epochs - state.epoch - 1,
    )


def evaluation_progress(
    images: int, batch: int, every: int, context: Context, title: str = "evaluation"
) -> Progress:
    """Makes the progress of an evaluation, which has a speed and an ETA but no figures yet.

    Args:
        images: to evaluate, over all ranks.
        batch: images of a step, over all ranks.
        every: steps between two lines.
        context: the run's ranks; rank 0 alone speaks.
        title: what is evaluated.
    """
    share = max(1, batch // context.world_size)
    own = math.ceil(images / context.world_size)  # of rank 0, which speaks
    total = math.ceil(own / share)
    decimals = 0 if batch > context.world_size else 1  # a detector takes its images one by one
    return Progress(title, total, batch, every, decimals=decimals, context=context)


def fitted(line: str) -> list[str]:
    """Returns a line in parts of the terminal's width, broken between words; elsewhere whole."""
    if not sys.stdout.isatty():
        return [line]
    width = max(20, shutil.get_terminal_size().columns)
    return textwrap.wrap(
        line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def watched(batches: Iterable[Item], progress: Progress) -> Iterator[Item]:
    """Gives the batches on, and counts a step when the next one is fetched.

    The last step has no line: the result follows it.
    """
    try:
        for batch in batches:
            yield batch
            if progress.advance() and progress.step < progress.total:
                progress.show()
    finally:
        progress.close()


def duration(seconds: float) -> str:
    """Formats seconds: 65.2 → "1:05", 3700 → "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

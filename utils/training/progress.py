"""Shows the progress of an epoch: a bar on a terminal, lines elsewhere."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from utils.system.distributed import Context

Item = TypeVar("Item")
BAR = 3  # columns that a bar keeps on a narrow terminal
DETAILS = 12  # columns of room that are worth beginning with details
UNKNOWN = "?"  # a time left, before anything has told it


@dataclass(frozen=True)
class StepWords:
    """Says how the figures of an epoch under way are written.

    Args:
        figures: means so far → the words that a bar always shows.
        details: means so far → further words; a bar shows them last, where it has room.
        lr_digits, speed_decimals: of the learning rate, and of images per second.
    """

    figures: Callable[[Mapping[str, float]], str]
    details: Callable[[Mapping[str, float]], str] = lambda means: ""
    lr_digits: int = 4
    speed_decimals: int = 0


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
        words: how figures are said.
        quiet: say nothing (ranks above 0).
        pace: of the run; None for an evaluation with nothing before it.
        epochs_left: epochs of the run after this one; 0 shows no time for the run.
    """

    def __init__(
        self,
        title: str,
        total: int,
        images: int,
        every: int,
        words: StepWords,
        *,
        done: int = 0,
        quiet: bool = False,
        pace: Pace | None = None,
        epochs_left: int = 0,
    ):
        self.words = words
        self.title, self.total, self.images, self.every = title, total, images, every
        self.step = done
        self.since = self.started = self.last = time.perf_counter()
        self.since_step = self.first = done
        self.quiet = quiet
        self.pace, self.epochs_left = pace or Pace(), epochs_left
        self.skips_one = self.pace.step is None  # this process has not compiled yet
        self.seconds, self.counted = 0.0, 0  # of the steps that tell how long others will take
        self.shown: list[str] = []  # what the bar says before and after the ETA
        on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.bar = None
        if on_terminal and not quiet:
            first = f"{{bar}}| ETA {UNKNOWN}"  # drawn at once; not tqdm's own, and never too wide
            self.bar = tqdm(
                total=total, initial=done, leave=False, dynamic_ncols=True, bar_format=first
            )
            self._redraw()

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
        if self.bar is not None:
            self.bar.bar_format = self._bar_format()
            self.bar.update()
        return self.step % self.every == 0 or self.step == self.total

    def show(self, means: Mapping[str, float], lr: float | None = None) -> None:
        """Shows the means so far in the epoch, with the speed since the last time.

        Args:
            means: what the words are made of.
            lr: the learning rate; None in an evaluation, which has none.
        """
        now = time.perf_counter()
        speed = (self.step - self.since_step) * self.images / max(now - self.since, 1e-9)
        self.since, self.since_step = now, self.step
        if self.quiet:
            return
        figures, details = self.words.figures(means), self.words.details(means)
        rate = f"{speed:,.{self.words.speed_decimals}f} images/s"
        if self.bar is not None:
            self.shown = [*filter(None, figures.split("  ")), rate, *filter(None, [details])]
            self._redraw()
            return
        parts = [
            self.title,
            f"step {self.step:>{len(str(self.total))}}/{self.total}",
            f"{figures} {details}".strip(),
            "" if lr is None else f"lr {lr:.{self.words.lr_digits}g}",
            rate,
            ", ".join(self.times_left()),
        ]
        print("  ".join(filter(None, parts)), flush=True)

    def times_left(self) -> list[str]:
        """Says how long the epoch will take yet, and the run where it has further epochs."""
        step = self.pace.step
        left = self.total - self.step
        if step is None:
            epoch, run = (0.0 if left == 0 else None), None
        else:
            epoch = step * left
            later = self.epochs_left * step * self.total
            run = epoch + later + (self.epochs_left + 1) * self.pace.between
        times = [f"ETA {UNKNOWN if epoch is None else duration(epoch)}"]
        if self.epochs_left:
            times.append(f"run {UNKNOWN if run is None else duration(run)}")
        return times

    def _redraw(self) -> None:
        assert self.bar is not None
        self.bar.bar_format = self._bar_format()
        self.bar.refresh()

    def _bar_format(self) -> str:
        """tqdm's format of a bar of BAR columns or more, with what has room beside it.

        The ETA always has; then come the run's, the figures, the speed and their details.
        """
        assert self.bar is not None
        width = self.bar.format_dict["ncols"] or 80
        eta, *run = self.times_left()
        head = f"{self.title} {{percentage:3.0f}}%|"
        room = width - len(f"{self.title} 100%|| {eta}") - BAR
        if room < 0:  # a very narrow terminal: even the title has to go
            return f"{{bar}}| {eta}"
        if run and len(run[0]) + 2 <= room:
            eta += f", {run[0]}"
            room -= len(run[0]) + 2
        kept = []
        for words in self.shown:
            if words.startswith("("):  # details stand last, and may be cut
                continue
            if len(words) + 2 > room:
                break
            kept.append(words)
            room -= len(words) + 2
        details = self.shown[-1] if len(kept) < len(self.shown) else ""
        details = details[: room - 2] if details.startswith("(") else ""
        tail = [*kept, eta, details] if room > DETAILS else [*kept, eta]
        text = "  ".join(filter(None, tail)).replace("{", "{{").replace("}", "}}")
        return f"{head}{{bar}}| {text}"

    def close(self) -> float:
        """Ends the bar and returns the mean images per second of the steps it saw."""
        if self.bar is not None:
            self.bar.close()
        steps = self.step - self.first
        return steps * self.images / max(time.perf_counter() - self.started, 1e-9)


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
    words = StepWords(lambda means: "", speed_decimals=decimals)
    return Progress(title, total, batch, every, words, quiet=not context.is_main)


def watched(batches: Iterable[Item], progress: Progress) -> Iterator[Item]:
    """Gives the batches on, and counts a step when the next one is asked for.

    The last step has no line: the result follows it.
    """
    try:
        for batch in batches:
            yield batch
            if progress.advance() and progress.step < progress.total:
                progress.show({})
    finally:
        progress.close()


def duration(seconds: float) -> str:
    """Formats seconds: 65.2 → "1:05", 3700 → "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

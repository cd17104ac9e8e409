"""Shows the progress of an epoch: a bar on a terminal, lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm import tqdm


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


class Progress:
    """Shows a bar on a terminal; elsewhere a line every `every` steps.

    Args:
        title: such as "epoch 3/8".
        total: steps of the epoch, of which `done` lie behind.
        images: in one step, over all ranks.
        words: how figures are said.
        quiet: say nothing (ranks above 0).
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
    ):
        self.words = words
        self.title, self.total, self.images, self.every = title, total, images, every
        self.step = done
        self.since = self.started = time.perf_counter()
        self.since_step = self.first = done
        self.quiet = quiet
        on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.bar = None
        if on_terminal and not quiet:
            self.bar = tqdm(
                total=total,
                initial=done,
                leave=False,
                dynamic_ncols=True,
                bar_format=self.bar_format("ETA {remaining}"),
            )

    def bar_format(self, figures: str) -> str:
        """Returns tqdm's format of a bar that leaves 80 columns to the figures, which are cut at
        the end.

        tqdm's own spends half of them on the time passed and two speeds.
        """
        return f"{self.title} {{percentage:3.0f}}%|{{bar}}| {figures}"

    def advance(self) -> bool:
        """Counts a step; returns True when figures are due for `show`."""
        self.step += 1
        if self.bar is not None:
            self.bar.update()
        return self.step % self.every == 0 or self.step == self.total

    def show(self, means: Mapping[str, float], lr: float) -> None:
        """Shows the means so far in the epoch, with the speed since the last time."""
        now = time.perf_counter()
        speed = (self.step - self.since_step) * self.images / max(now - self.since, 1e-9)
        self.since, self.since_step = now, self.step
        if self.quiet:
            return
        figures, details = self.words.figures(means), self.words.details(means)
        rate = f"{speed:,.{self.words.speed_decimals}f} images/s"
        if self.bar is not None:
            text = f"{figures}  {rate}  ETA {{remaining}}"
            self.bar.bar_format = self.bar_format(f"{text}  {details}" if details else text)
            self.bar.refresh()
            return
        left = (now - self.started) / (self.step - self.first) * (self.total - self.step)
        print(
            f"{self.title}  step {self.step:>{len(str(self.total))}}/{self.total}  "
            f"{figures}{' ' + details if details else ''}  lr {lr:.{self.words.lr_digits}g}  "
            f"{rate}  ETA {duration(left)}",
            flush=True,
        )

    def close(self) -> float:
        """Ends the bar and returns the mean images per second of the steps it saw."""
        if self.bar is not None:
            self.bar.close()
        steps = self.step - self.first
        return steps * self.images / max(time.perf_counter() - self.started, 1e-9)


def duration(seconds: float) -> str:
    """Formats seconds: 65.2 → "1:05", 3700 → "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

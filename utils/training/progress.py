"""The progress of an epoch: a bar on a terminal, lines elsewhere."""

import os
import sys
import time

from tqdm import tqdm


class Progress:
    """A bar on a terminal; elsewhere a line every `every` steps.

    Args:
        title: such as "epoch 3/8".
        total: steps of the epoch, of which `done` lie behind.
        images: in one step, over all ranks.
        quiet: say nothing (ranks above 0).
    """

    def __init__(self, title: str, total: int, images: int, every: int, done: int = 0, quiet=False):
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
        """tqdm's format of a bar that leaves 80 columns to the figures; they are cut from the end.

        tqdm's own spends half of them on the time passed and two speeds.
        """
        return f"{self.title} {{percentage:3.0f}}%|{{bar}}| {figures}"

    def advance(self) -> bool:
        """Counts a step; True when figures are due for `show`."""
        self.step += 1
        if self.bar is not None:
            self.bar.update()
        return self.step % self.every == 0 or self.step == self.total

    def show(self, figures: dict[str, float], lr: float) -> None:
        """Shows loss and top-1 so far, with the speed since the last time."""
        now = time.perf_counter()
        speed = (self.step - self.since_step) * self.images / max(now - self.since, 1e-9)
        self.since, self.since_step = now, self.step
        if self.quiet:
            return
        text = f"loss {figures['loss']:.4f}  top-1 {figures['top1']:.2f} %"
        if self.bar is not None:
            text += f"  {speed:,.0f} images/s  ETA {{remaining}}"
            self.bar.bar_format = self.bar_format(text)
            self.bar.refresh()
            return
        left = (now - self.started) / (self.step - self.first) * (self.total - self.step)
        print(
            f"{self.title}  step {self.step:>{len(str(self.total))}}/{self.total}  {text}  "
            f"lr {lr:.4g}  {speed:,.0f} images/s  ETA {duration(left)}",
            flush=True,
        )

    def close(self) -> float:
        """Ends the bar and returns the mean images per second of the steps it saw."""
        if self.bar is not None:
            self.bar.close()
        steps = self.step - self.first
        return steps * self.images / max(time.perf_counter() - self.started, 1e-9)


def duration(seconds: float) -> str:
    """65.2 → "1:05", 3700 → "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""The bar of progress, on a real terminal of 80 columns."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios

from utils.classification.outcome import CLASSIFICATION
from utils.detection.outcome import DETECTION
from utils.training.progress import Progress


@contextlib.contextmanager
def terminal(monkeypatch):
    """Standard error on a terminal; gives a function that returns the lines drawn there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)

        def drawn() -> list[str]:
            stream.flush()
            text = b""
            while select.select([ours], [], [], 0.1)[0]:  # a terminal gives it piece by piece
                text += os.read(ours, 1 << 16)
            return re.split(r"[\r\n]+", text.decode())

        yield drawn
    os.close(ours)


def advance(progress, seconds, monkeypatch):
    """A hundred steps that seem to take `seconds`."""
    began = progress.started
    monkeypatch.setattr("time.perf_counter", lambda: began + seconds)
    for _ in range(100):
        progress.advance()
    progress.bar.start_t -= seconds  # the bar has a clock of its own


def test_the_bar_shows_loss_top1_speed_and_eta(monkeypatch):
    with terminal(monkeypatch) as drawn:
        progress = Progress("epoch 37/100", 5004, 20480, 100, CLASSIFICATION.step_words, done=2402)
        advance(progress, 100 * 20480 / 12345, monkeypatch)
        progress.show({"loss": 6.9078, "top1": 48.21}, 0.1)
        lines = drawn()
        progress.close()
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(
        r"epoch 37/100  50%\|.+\| loss 6\.9078  top-1 48\.21 %  12,345 images/s  ETA 1:09:\d\d",
        lines[-1],
    )


def test_a_detectors_bar_keeps_speed_and_eta_before_the_parts_of_the_loss(monkeypatch):
    with terminal(monkeypatch) as drawn:
        progress = Progress("epoch 12/12", 14659, 8, 100, DETECTION.step_words, done=7000)
        advance(progress, 100, monkeypatch)
        losses = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")
        progress.show({"loss": 12.3456} | {f"loss_{name}": 1.0 for name in losses}, 0.1)
        lines = drawn()
        progress.close()
    assert max(map(len, lines)) <= 80
    assert re.match(
        r"epoch 12/12  48%\|.+\| loss 12\.346  8\.0 images/s  ETA 2:05:\d\d  \(objec", lines[-1]
    )

"""The bar of progress, on real terminals of several widths, and its lines elsewhere."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios

import torch

from utils.system.distributed import Context
from utils.training.progress import Pace, Progress, evaluation_progress, fitted, watched


@contextlib.contextmanager
def terminal(monkeypatch, columns=80, name="stderr"):
    """A stream on a terminal; gives a function that returns the lines drawn there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, name, stream)

        def drawn() -> list[str]:
            stream.flush()
            text = b""
            while select.select([ours], [], [], 0.1)[0]:  # a terminal gives it piece by piece
                text += os.read(ours, 1 << 16)
            return re.split(r"[\r\n]+", text.decode())

        yield drawn
    os.close(ours)


def advance(progress, seconds, monkeypatch, steps=100):
    """Steps that seem to take `seconds` in all, all alike."""
    now = [progress.last]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for _ in range(steps):
        now[0] += seconds / steps
        progress.advance()


def classifier_line(monkeypatch, columns, epochs_left):
    """What the bar of an epoch shows last on a terminal of this width."""
    with terminal(monkeypatch, columns) as drawn:
        progress = Progress("epoch 37/100", 5004, 20480, 100, done=2402, epochs_left=epochs_left)
        advance(progress, 100 * 20480 / 12345, monkeypatch)
        progress.show("loss 6.9078  top-1 48.21 %", lr="0.1")
        lines = drawn()
        progress.close()
    assert max(map(len, lines)) <= columns
    return lines[-1]


def test_the_bar_shows_times_figures_and_speed(monkeypatch):
    assert re.fullmatch(
        r"epoch 37/100  50%\|.+\|, ETA 1:09:\d\d  loss 6\.9078  top-1 48\.21 %  12,345 images/s",
        classifier_line(monkeypatch, 90, 0),
    )
    assert re.fullmatch(
        r"epoch 37/100  50%\|.+\|, ETA 1:09:\d\d, run 146:2[56]:\d\d  loss 6\.9078  "
        r"top-1 48\.21 %  12,345 images/s",
        classifier_line(monkeypatch, 100, 63),
    )


def test_narrow_terminals_lose_figures_and_keep_the_times(monkeypatch):
    for columns in (80, 60, 45):
        line = classifier_line(monkeypatch, columns, 63)
        assert re.match(r"epoch 37/100  50%\|.+\|, ETA 1:09:\d\d, run 146:2", line), line
    classifier_line(monkeypatch, 24, 63)  # not wider than the terminal


def test_the_first_step_which_compiles_is_not_in_the_eta(monkeypatch, capsys):
    pace = Pace()
    progress = Progress("epoch 1/3", 11, 8, 1, pace=pace, epochs_left=2)
    advance(progress, 500, monkeypatch, steps=1)
    progress.show("loss 1.0000", lr="0.1")
    advance(progress, 20, monkeypatch, steps=10)
    assert pace.step == 2
    pace.note_between(70)
    pace.note_between(7)
    progress = Progress("epoch 2/3", 11, 8, 1, pace=pace, epochs_left=1)
    advance(progress, 2, monkeypatch, steps=1)
    progress.show("loss 1.0000", lr="0.1")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("images/s  ETA ?, run ?")
    assert second.endswith("images/s  ETA 0:20, run 0:56")  # 10 and 11 steps, two evaluations


def test_an_evaluation_has_lines_at_its_steps_and_none_at_the_last(monkeypatch, capsys):
    context = Context(torch.device("cpu"))
    progress = evaluation_progress(359, 32, 4, context, "epoch 1/8 val")
    assert list(watched(iter(range(12)), progress)) == list(range(12))
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d,]+ images/s", "N images/s", line) for line in lines] == [
        "epoch 1/8 val  step  4/12  N images/s  ETA 0:00",
        "epoch 1/8 val  step  8/12  N images/s  ETA 0:00",
    ]
    with terminal(monkeypatch, 60) as drawn:
        list(watched(iter(range(12)), evaluation_progress(359, 32, 4, context)))
        assert any(re.match(r"evaluation .+%\|.+\|, ETA 0:00", line) for line in drawn())
    assert not capsys.readouterr().out


def test_a_long_line_is_broken_between_words_on_a_terminal_alone(monkeypatch):
    line = "epoch 1/30  train loss 0.1234 top-1 98.76 %  val loss 0.2345 top-1 97.65 %  (best)"
    assert fitted(line) == [line]
    for columns in (24, 40, 60, 200):
        with monkeypatch.context() as patch, terminal(patch, columns, "__stdout__"):
            patch.delenv("COLUMNS", raising=False)
            patch.setattr(sys, "stdout", sys.__stdout__)
            parts = fitted(line)
        assert max(map(len, parts)) <= columns
        assert " ".join(parts).split() == line.split()
    assert parts == [line]

"""A run of main.py that is killed and stopped on its way, beside one that is not."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.kill_driver import STATE, same

import main as script
from utils.runs import checkpoint
from utils.training.state import TrainingState


class Killed(BaseException):
    """As sudden as SIGKILL: nothing in the program catches it."""


def cut_twice(
    call: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: object
) -> dict[str, object]:
    """Runs two epochs of three steps in `folder`/through, and again in `folder`/cut: there killed
    in step 2 and asked to stop in the second epoch. Both must leave the same behind, bit for bit.

    Returns:
        The last checkpoint.
    """
    flags = (*flags, "--epochs", 2, "--save-every", 1)
    code, _, err = call(*flags, "--output", "through")
    assert (code, err) == (0, [])
    finish_step = TrainingState.finish_step
    steps = []

    def stumble(state: TrainingState, broken: list[int]) -> None:
        finish_step(state, broken)
        steps.append((state.epoch, state.step))
        if len(steps) == 2:
            raise Killed  # in step 2 of 3, saved after step 1
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)  # in the second epoch, which saves

    again = ("--resume", "auto", "--output", "cut", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "finish_step", stumble)
        patch.setattr(sys, "argv", ["main.py", *map(str, again)])
        with pytest.raises(Killed):
            script.main()
        assert checkpoint.load(folder / "cut" / "last.pth")["progress"]["step"] == 1
        assert call(*again)[0] == 143
        assert call(*again, "-j", 1)[0] == 0
    assert steps == [(0, 1), (0, 2), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    for name in ("last.pth", "best.pth"):
        one, other = (checkpoint.load(folder / run / name) for run in ("through", "cut"))
        assert one.keys() == other.keys()
        for part in STATE:
            assert same(one.get(part), other.get(part)), f"{name}: {part}"
    csv = [(folder / run / "metrics.csv").read_bytes() for run in ("through", "cut")]
    assert csv[0] == csv[1]
    return checkpoint.load(folder / "through" / "last.pth")

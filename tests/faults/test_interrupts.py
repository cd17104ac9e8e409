"""Ctrl-C at any moment, and several of them: one line, and whole checkpoints."""

import signal
import time

import pytest
from helpers.small_runs import LONG, progress

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("seconds", [0.5, 2, 4, 8])
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_before_training(start, tree, seconds, times):
    """While Python imports, the data is read or the network is built."""
    running = start(*LONG, "-a", "eca_resnet152", "--img-size", 224, "--output", "run", tree)
    time.sleep(seconds)
    for _ in range(times):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    code, _, err = running.end()
    assert code in (130, -signal.SIGINT)  # a shell reports both as 130
    assert err in (["interrupted"], [])  # nothing where it could still save


@pytest.mark.parametrize("workers", [0, 2])
def test_three_quick_ctrl_c(start, tree, tmp_path, workers):
    running = start(*LONG, "-j", workers, "--save-every", 1, "--output", "run", tree)
    running.wait_for("epoch 2/500  step 2/4")
    for _ in range(3):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    code, _, err = running.end()
    assert code in (130, -signal.SIGINT)
    assert err in (["interrupted"], [])
    assert progress(tmp_path / "run")["epoch"] >= 1

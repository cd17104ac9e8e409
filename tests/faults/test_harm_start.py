"""Harm done in a run's first seconds: its launcher killed, and Ctrl-C while it imports.

All of it is real, as in test_harm.py. `make test-slow`.
"""

import time

import pytest
from helpers.small_runs import LONG, PATIENCE, all_gone

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("seconds", [0, 2, 4, 6, 8])
def test_ranks_end_with_a_launcher_killed_in_the_first_seconds(start, tree, seconds):
    """They would wait for each other for 30 minutes: the store that they meet in is gone."""
    running = start(*LONG, "--output", "run", tree, ranks=2)
    end = time.monotonic() + PATIENCE
    while len(ranks := running.children()) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(seconds)
    running.process.kill()
    running.process.wait(PATIENCE)
    assert all_gone(ranks, within=PATIENCE)

"""Work shared among processes."""

import os
import signal
import time

import pytest
from helpers.small_runs import own_children

from utils.system.errors import EXIT_FAILED, UserError
from utils.system.processes import shared


def power(base: int, exponent: int) -> int:
    return base**exponent


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain(_: int) -> None:
    raise UserError("no room", EXIT_FAILED)


def note(place: str) -> None:
    time.sleep(0.05)
    with open(place, "x"):
        pass


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes):
    found = shared(power, range(7), [2] * 7, processes=processes, chunk=2)
    assert list(found) == [0, 1, 4, 9, 16, 25, 36]


def test_a_killed_process_is_told_in_one_line():
    with pytest.raises(UserError, match="was killed") as fault:
        list(shared(die, [1, 2, 3], processes=2))
    assert fault.value.exit_code == EXIT_FAILED


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_keeps_its_exit_code(processes):
    with pytest.raises(UserError, match="no room") as fault:
        list(shared(complain, [1], processes=processes))
    assert fault.value.exit_code == EXIT_FAILED


def test_who_stops_early_does_not_wait_for_the_rest(tmp_path):
    places = [str(tmp_path / str(i)) for i in range(200)]
    found = shared(note, places, processes=2)
    next(found)
    found.close()
    for process in own_children():  # they end when nothing is left to do
        process.join()
    assert len(os.listdir(tmp_path)) < len(places)

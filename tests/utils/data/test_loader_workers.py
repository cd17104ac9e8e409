"""A loader worker that dies, in whatever way the news reaches the main process."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from utils.data import loader
from utils.data.loader import checked, leave_broken_connections_unsaid
from utils.system.faults import of_outside


class Batches:
    """Stands for torch's iterator; raises as that does when a worker goes."""

    def __init__(self, processes, error):
        self._workers, self.error = processes, error

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error


class Loader:
    def __init__(self, batches, num_workers=2):
        self.batches, self.num_workers = batches, num_workers

    def __iter__(self):
        return self.batches


@pytest.fixture
def processes(monkeypatch):
    """Two that wait."""
    monkeypatch.setattr(loader, "end_children_at_exit", lambda: None)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    for process in both:
        process.start()
    yield both
    for process in both:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        EOFError(),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_s_death_is_told_with_its_signal(processes, error):
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        next(checked(Loader(Batches(processes, error))))
    assert str(of_outside(caught.value, "")).startswith(
        "a loader worker was killed by SIGKILL (out of memory?)"
    )


def test_other_errors_are_what_they_were(processes, monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE", 0.1)
    own = ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.\n…")
    lone = ConnectionResetError("of a data set that is read over a network")
    # The first while the workers live: a fault ends them.
    for error, number in (EOFError(), 2), (own, 2), (lone, 0), (ValueError("a fault of ours"), 2):
        with pytest.raises(type(error)) as caught:
            next(checked(Loader(Batches(processes, error), number)))
        assert caught.value is error


def test_no_worker_is_left_after_a_fault(processes):
    """Although the fault's traceback refers to the pass."""
    with pytest.raises(ValueError, match="a fault of ours") as caught:
        next(checked(Loader(Batches(processes, ValueError("a fault of ours")))))
    assert caught.tb is not None
    assert all(multiprocessing.connection.wait([process.sentinel], 0) for process in processes)


def test_a_connection_that_the_main_process_breaks_is_not_told_of(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: told.append(error[0]))
    leave_broken_connections_unsaid()
    for kind in (ConnectionResetError, BrokenPipeError, EOFError, KeyError):
        sys.excepthook(kind, kind(), None)
    assert told == [KeyError]
    assert capsys.readouterr().err == ""

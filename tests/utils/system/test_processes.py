"""Children at the end of a process, and how many there should be."""

import multiprocessing
import os
import signal
import socket
import time

import pytest

from utils.system import processes
from utils.system.errors import UserError
from utils.system.processes import end_children


@pytest.fixture
def child():
    # "spawn" would import torch again; the child does nothing but sleep.
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    former = signal.getsignal(signal.SIGCHLD)
    yield process
    signal.signal(signal.SIGCHLD, former)
    if not multiprocessing.connection.wait([process.sentinel], 0):
        os.kill(process.pid, signal.SIGKILL)


def test_a_child_is_killed(child):
    assert end_children()
    assert multiprocessing.connection.wait([child.sentinel], 0)


def test_a_child_whose_exit_status_another_took_counts_as_gone(child):
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)  # as the thread of a ProcessPoolExecutor may, a moment before us
    assert end_children()


def test_a_child_that_does_not_die_is_told(child, monkeypatch):
    monkeypatch.setattr("utils.system.processes.PATIENCE", 0.05)
    monkeypatch.setattr(child, "kill", lambda: None)  # as in an uninterruptible read
    assert not end_children()


@pytest.fixture
def store(monkeypatch):
    """A socket where torchrun's store is said to be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        monkeypatch.setattr(processes, "die_with_parent", lambda signum: None)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def test_a_launcher_that_answers_is_alive(store):
    processes.end_with_launcher()


def test_a_launcher_that_ended_before_it_could_be_asked(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid", lambda: processes.PARENT + 1)  # another process adopted us
        with pytest.raises(UserError, match="launcher of this process has ended"):
            processes.end_with_launcher()
    store.close()  # adopted before we looked: its store tells
    with pytest.raises(UserError, match="launcher of this process has ended"):
        processes.end_with_launcher()

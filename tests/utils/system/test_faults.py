"""What ends a script: its exit code, one line for a fault from outside, a traceback for our own."""

import contextlib
import errno
import io
import os
import signal
import sys

import pytest
import torch

from utils.system import distributed, faults
from utils.system.errors import UserError
from utils.system.faults import of_outside, run_script


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Children of other tests live on, and so does Ctrl-C for whoever runs the tests."""
    monkeypatch.setattr(faults, "end_children", lambda: True)
    former = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, former)


def ended(main) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_script(main, "a smaller -b")
    return stopped.value.code


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the thing: the remedy", 3), 3, "the thing: the remedy"),
        (MemoryError(), 1, "out of memory: give a smaller -b"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory: give a smaller -b"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "out of memory: give a smaller -b",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", b"a/b"),
            1,
            "a/b: No space left on device; make room",
        ),
        (ValueError("embedded null byte"), 2, "a file's name holds a zero byte: give another"),
        (SystemExit(2), 2, None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, None),
    ],
)
def test_faults_from_outside_are_one_line(error, code, said, capsys):
    assert ended(raising(error)) == code
    assert capsys.readouterr().err == ("" if said is None else f"error: {said}\n")


def test_exit_codes():
    assert ended(lambda: None) == 0
    assert ended(lambda: 143) == 143


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), KeyError("x"), RuntimeError("shape"), FileNotFoundError("x")]
)
def test_our_own_faults_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        run_script(raising(error))
    assert caught.value is error
    assert caught.traceback[-1].name == "main"


@pytest.mark.parametrize("becomes", [KeyboardInterrupt, RuntimeError])
def test_ctrl_c(becomes, capfd, monkeypatch):
    """Whatever a library makes of it. The script's end is cut short: os._exit, as it may wait."""

    def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise becomes() from None

    class Left(BaseException):
        pass

    def leave(code: int):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        run_script(main)
    assert left.value.args == (130,)
    assert capfd.readouterr().err == "interrupted\n"


def test_ctrl_c_stays_ignored_in_the_background():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert ended(lambda: signal.raise_signal(signal.SIGINT)) == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many open files: use fewer"),
        (
            OSError("Caught OSError in DataLoader worker\n… [Errno 24] Too many open files"),
            "too many open files: use fewer",
        ),
        (RuntimeError("received 0 items of ancdata"), "too many open files: use fewer"),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "Resource temporarily unavailable; use fewer workers (-j), or raise the limit of proc",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "a loader worker was killed by SIGKILL (out of memory?): use fewer workers (-j) or a ",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
            "a loader worker found no room in shared memory (/dev/shm): enlarge it",
        ),
    ],
)
def test_limits_of_files_and_processes(error, message):
    fault = of_outside(error, "")
    assert str(fault).startswith(message)
    assert fault.exit_code == 1


def test_a_lost_peer_is_one_of_a_run_of_several_processes(monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert of_outside(error, "") is None
    monkeypatch.setenv("RANK", "1")
    assert str(of_outside(error, "")).startswith("another process of this run ended or hangs")


@contextlib.contextmanager
def full_disk():
    """stdout on one, written line by line as a terminal's; yields what is said on stderr."""
    said = io.StringIO()
    with (
        open("/dev/full", "w", buffering=1, encoding="utf-8") as stream,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", said)
        yield said


def test_a_result_that_cannot_be_written_is_a_fault():
    context = distributed.Context(torch.device("cpu"))
    with full_disk() as said:
        assert ended(lambda: context.say("result")) == 1
        print("what is printed later goes nowhere", flush=True)
    assert said.getvalue() == "error: No space left on device; make room\n"


def test_a_run_goes_on_where_its_log_cannot_be_written():
    context = distributed.Context(torch.device("cpu"), trains=True)
    with full_disk() as said:
        for _ in range(3):
            context.say("epoch")
    assert said.getvalue() == "! stdout: No space left on device; what follows is not shown\n"

"""Runs a script: a fault from outside is one line and an exit code, our own has its traceback."""

import errno
import os
import signal
import sys
from collections.abc import Callable

import torch

from utils.system import signals
from utils.system.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    FEWER_FILES,
    TOO_MANY_FILES,
    UserError,
)
from utils.system.processes import end_children, fit_threads
from utils.system.text import printable

BAD_PATHS = {  # what a user named cannot be right
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file stands where the path wants a folder; give another path",
    errno.ELOOP: "its links lead in a circle; give another path",
}
FAILURES = {  # what holds a path gave way
    errno.EACCES: "mend its rights, or choose another place",
    errno.EPERM: "mend its rights, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EIO: "see to the storage, and start again",
    errno.ESTALE: "see to the storage, and start again",
    errno.EAGAIN: "use fewer workers (-j), or raise the limit of processes (ulimit -u)",
}
# Of the CPU's allocator and its backends, which have no exception type of their own.
OUT_OF_MEMORY = [
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "Cannot allocate memory",
]
NO_FILES_LEFT = ("Too many open files", "ancdata")  # as errors from a worker put it
LOST_PEER = ("peer", "gloo", "NCCL", "Broken pipe", "Timed out waiting", "process group")
AGAIN = "start again (a run: with --resume auto)"


def run_script(main: Callable[[], int | None], smaller: str = "smaller or fewer images") -> None:
    """Calls `main` and exits with its code. No process that it started outlives this one.

    Args:
        smaller: what spares memory, in the words of the script's flags.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    former = signal.getsignal(signal.SIGINT)
    if former != signal.SIG_IGN:  # as in a job in the background
        signal.signal(signal.SIGINT, signals.interrupt)
    fit_threads()
    code = _exit_code(main, smaller)
    if not end_children() or signals.interrupted():  # Python's end would wait, or be cut short
        os._exit(code if isinstance(code, int) else EXIT_FAILED)
    signal.signal(signal.SIGINT, former)
    sys.exit(code)


def _exit_code(main: Callable[[], int | None], smaller: str) -> int | str | None:
    """Calls `main`, and says in one line what it raised; returns the exit code."""
    try:
        try:
            code: int | str | None = main() or 0
        except SystemExit as error:  # argparse
            code = error.code
        sys.stdout.flush()  # a full disk shows here at the latest
        return code
    except BaseException as error:
        _empty_stdout()
        if isinstance(error, KeyboardInterrupt) or signals.interrupted():
            return EXIT_INTERRUPTED
        if isinstance(error, BrokenPipeError):  # `… | head` closed our output: not worth a line
            return EXIT_FAILED
        code = _say(error, smaller)
        if code is None:
            end_children()
            raise  # our own fault
        return code


def _say(error: BaseException, smaller: str) -> int | None:
    """Says in one line what came from outside; returns the exit code, or None for our own fault.

    Not in the frame that caught it: an error that its own traceback refers to is freed late, and
    with it loader workers that torch can then no longer tell to end.
    """
    fault = of_outside(error, smaller)
    if fault is None:
        return None
    rank = os.environ.get("RANK")  # several processes may each have a line to say
    where = f" (rank {rank})" if rank else ""
    print(f"error{where}: {printable(str(fault))}", file=sys.stderr)
    return fault.exit_code


def _empty_stdout() -> None:
    """Writes what waits in stdout; what cannot be written goes to nowhere, not into a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        signals.lead_to_nowhere(sys.stdout.fileno())


def of_outside(error: BaseException, smaller: str) -> UserError | None:
    """Returns a fault from outside as one line with its remedy; None for a fault of ours.

    They are: no memory; no more files or processes; a file system that gives way; a loader worker
    that was killed (torch raises that wherever the main process happens to be when the news
    arrives, so no smaller place could catch it); a process of the run that ended while this one
    waited for it.
    """
    if isinstance(error, UserError):
        return error
    text = str(error)
    if is_out_of_memory(error):
        return UserError(f"out of memory: give {smaller}", EXIT_FAILED)
    if isinstance(error, ValueError) and text.startswith("embedded null"):
        return UserError("a file's name holds a zero byte: give another", EXIT_BAD_INPUT)
    if not isinstance(error, OSError | RuntimeError):
        return None
    if getattr(error, "errno", None) in TOO_MANY_FILES or any(s in text for s in NO_FILES_LEFT):
        return UserError(f"too many open files: {FEWER_FILES}", EXIT_FAILED)
    if isinstance(error, OSError):
        if error.errno not in BAD_PATHS | FAILURES:
            return None
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        code = EXIT_BAD_INPUT if error.errno in BAD_PATHS else EXIT_FAILED
        remedy = (BAD_PATHS | FAILURES)[error.errno]
        return UserError(f"{where}{error.strerror}; {remedy}", code)
    if "DataLoader worker" in text:
        return _dead_worker(text)
    if "RANK" in os.environ and any(sign in text for sign in LOST_PEER):
        return UserError(
            "another process of this run ended or hangs (its own lines say why); nothing saved is "
            f"lost: {AGAIN}",
            EXIT_FAILED,
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that Python, a device or the CPU's allocator had no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def _dead_worker(text: str) -> UserError:
    if "Bus error" in text or "shared memory" in text:
        return UserError(
            "a loader worker found no room in shared memory (/dev/shm): enlarge it (docker: "
            f"--shm-size), or use fewer workers (-j); {AGAIN}",
            EXIT_FAILED,
        )
    names = {s.name: f"killed by signal: {signal.strsignal(s)}." for s in signal.Signals}
    how = next((f" by {name}" for name, phrase in names.items() if phrase in text), "")
    return UserError(
        f"a loader worker was killed{how} (out of memory?): use fewer workers (-j) or a smaller "
        f"batch; {AGAIN}",
        EXIT_FAILED,
    )

"""Processes that end together: what a run started never outlives it."""

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait

PR_SET_PDEATHSIG = 1
PATIENCE = 5.0  # seconds for a killed process to go


def processors() -> int:
    """How many this process may use: a scheduler often grants a part of the machine."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Processes that read images where the user does not say: what feeds one network."""
    return min(4, processors())


def die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send `signum` to this process when its parent ends, however it ends.

    Linux only; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signum))


def end_children() -> bool:
    """Kills what this process started, at its very end.

    Loader workers ignore SIGTERM (it is the main process that answers it), so nothing softer ends
    one that hangs in a read.

    Returns:
        Whether all are gone. One that waits for a dead disk cannot be killed, and Python would wait
        for it for ever at exit.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take this for a fault
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    # Not is_alive(): where a pool's own thread took the exit status first, that says yes for ever.
    return all(wait([child.sentinel], PATIENCE) for child in children)


@functools.cache
def end_children_at_exit() -> None:
    """Sees to `end_children` where nothing calls it; else Python waits for ever at exit."""
    atexit.register(end_children)

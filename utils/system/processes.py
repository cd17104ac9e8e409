"""Counts the processors that this process may use, runs work on them, and ends it in time."""

import atexit
import ctypes
import functools
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

import torch

from utils.system.errors import EXIT_FAILED, UserError

PR_SET_PDEATHSIG = 1
STORE_PATIENCE = 30.0  # seconds for a connection to torchrun's store
PATIENCE = 5.0  # seconds for a killed process to go
PARENT = os.getppid()  # as early as we can ask; another number later: that one has ended

GROUPS = Path("/sys/fs/cgroup")  # where Linux shows the limits of containers and jobs
OWN_GROUPS = Path("/proc/self/cgroup")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own choice of threads


def processors() -> int:
    """Returns how many processors this process may use: a scheduler often grants a part of the
    machine, and a container may have a limit. A part of a processor counts as one.
    """
    granted = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        granted = len(os.sched_getaffinity(0))
    limit = quota()
    return granted if limit is None else max(1, min(granted, math.ceil(limit)))


def quota() -> float | None:
    """Returns the processors' worth of time that control groups allow; None for no limit.

    It is the lowest of this process's group and of those above it, of either version of Linux's
    control groups. What cannot be read limits nothing.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return None
    shares = []
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if not controllers:
            root, read = GROUPS, _second_version
        elif "cpu" in names:
            root, read = GROUPS / "cpu", _first_version
        else:
            continue
        own = root / path.lstrip("/")
        # Inside a container the path may be the host's, which is not there: its root still is.
        shares += [read(folder) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return min((share for share in shares if share is not None), default=None)


def _second_version(folder: Path) -> float | None:
    try:
        allowed, period = (folder / "cpu.max").read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _first_version(folder: Path) -> float | None:
    try:
        allowed = int((folder / "cpu.cfs_quota_us").read_text())
        return allowed / int((folder / "cpu.cfs_period_us").read_text()) if allowed > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def fit_threads() -> None:
    """Gives PyTorch no more threads than there are processors, unless the user chose a number.

    PyTorch knows nothing of a container's limit: on two processors' worth of a machine of 64 its
    64 threads would wait for each other at every operation.
    """
    if not any(os.environ.get(name) for name in THREADS) and torch.get_num_threads() > processors():
        torch.set_num_threads(processors())


def default_workers() -> int:
    """Returns how many processes read images by default: what feeds one network.

    The ranks that torchrun starts on this machine share its processors.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, processors() // ranks))


def die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send `signum` to this process when its parent ends, however it ends.

    Linux only; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signum))


def end_with_launcher() -> None:
    """Ends this process with its launcher (torchrun), however that ends, or ended before now.

    The kernel tells of no end that came before it was asked, so the parent is looked at after it;
    and where that was adopted already when we first looked, the launcher's store does not answer.

    Raises:
        UserError: the launcher has ended.
    """
    die_with_parent(signal.SIGTERM)
    if os.getppid() != PARENT or not _launcher_answers():
        raise UserError("the launcher of this process has ended: start again", EXIT_FAILED)


def _launcher_answers() -> bool:
    """Whether torchrun's store can be reached; True where it is not torchrun that holds it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    for patience in (0, 1, 3, 5):  # seconds: another machine may be busy
        time.sleep(patience)
        try:
            socket.create_connection(address, timeout=STORE_PATIENCE).close()
            return True
        except OSError:
            pass
    return False


def end_children() -> bool:
    """Kills every child process, at the very end of the program.

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
    """Calls `end_children` when Python exits; else Python would wait for ever."""
    atexit.register(end_children)


Result = TypeVar("Result")


def shared(
    work: Callable[..., Result], *arguments: Iterable, processes: int, chunk: int = 1
) -> Iterator[Result]:
    """Yields `work` of each item, in order, computed by several processes; by this one for one.

    Args:
        work: a function of a module, or a partial of one.
        chunk: calls that a process takes at a time.

    Raises:
        UserError: a process was killed; or whatever `work` raises.
    """
    if processes == 1:
        yield from map(work, *arguments)
        return
    pool = ProcessPoolExecutor(processes, initializer=_init_process)
    try:
        yield from pool.map(work, *arguments, chunksize=chunk)
    except BrokenProcessPool:
        raise UserError(
            "a process that read images was killed (out of memory?): use fewer with -j", EXIT_FAILED
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the rest


def _init_process() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it
    torch.set_num_threads(1)

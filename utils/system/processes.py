"""Runs work in child processes, and ends them all with the program."""

import atexit
import ctypes
import functools
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
from typing import TypeVar

import torch

from utils.system.cpu_share import processors
from utils.system.errors import EXIT_FAILED, UserError

PR_SET_PDEATHSIG = 1
STORE_PATIENCE = 30.0  # seconds for a connection to torchrun's store
PATIENCE = 5.0  # seconds for a killed process to go
PARENT = os.getppid()  # as early as we can ask; another number later: that one has ended


def default_workers() -> int:
    """Returns how many processes read images by default: what feeds one network."""
    return min(4, processors())


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
            "a process that read images was killed (out of memory?): use fewer with -j",
            EXIT_FAILED,
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the rest


def _init_process() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it
    torch.set_num_threads(1)

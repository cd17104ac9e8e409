"""Work shared among processes that end with the program, however it ends."""

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from utils.system.errors import EXIT_FAILED, UserError
from utils.system.processes import die_with_parent

Result = TypeVar("Result")


def shared(
    work: Callable[..., Result], *arguments: Iterable, processes: int, chunk: int = 1
) -> Iterator[Result]:
    """`map` by processes of their own, with results in order; one process is this one.

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

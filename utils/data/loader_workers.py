"""Starts loader workers, and turns what goes wrong in them into one line."""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader

from utils.data.decoding import BrokenImageError
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.processes import PATIENCE, die_with_parent, end_children_at_exit

FILES = 8  # open files of this process for each worker, its queues and the batches on their way


def init_worker(_: int) -> None:
    """Prepares a loader worker, as `DataLoader(worker_init_fn=…)` asks."""
    die_with_parent()
    # Stop requests are for the main process, which finishes its step, saves and ends the workers.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    leave_broken_connections_unsaid()
    torch.set_num_threads(1)


def leave_broken_connections_unsaid() -> None:
    """Prints no traceback when the main process ends while it takes a batch from this worker.

    The thread that hands tensors over has no other place for it, and nobody is left to be told.
    """
    former = sys.excepthook

    def hook(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            former(kind, *rest)

    sys.excepthook = hook


def checked(loader: DataLoader) -> Iterator[Any]:
    """Yields the loader's batches, and turns faults of its workers into errors of one line.

    Raises:
        UserError: for a fault that came as a value, or where workers hang.
        RuntimeError: in torch's words, for a worker that died: see `faults.in_one_line`.
    """
    if loader.num_workers:
        end_children_at_exit()
    batches = None
    while True:
        try:
            if batches is None:
                batches = _begun(loader)  # which waits for the workers, too
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            # Those of a worker that is killed break before it counts as dead. What a worker
            # raised itself is marked as caught there.
            if loader.num_workers and not str(error).startswith("Caught "):
                raise _death(batches, error) from None
            raise
        except RuntimeError as error:
            if "DataLoader timed out" in str(error):
                raise UserError(
                    f"no batch from the loader workers for {loader.timeout:g} s: they hang (slow "
                    "or stuck storage?); raise --worker-timeout or use fewer workers (-j)",
                    EXIT_FAILED,
                ) from None
            if "exited unexpectedly" in str(error):
                raise _death(batches, error) from None
            raise
        if isinstance(batch, BrokenImageError | UserError):
            raise as_raised(batch)
        yield batch


def _begun(loader: DataLoader) -> Any:
    """Returns an iterator over the loader; one that could not be made leaves no traceback.

    torch's iterator fails once more when it is deleted half made: that is done here, unsaid.
    """
    try:
        if loader.num_workers:
            _want_files(FILES * loader.num_workers + FILES)
        return iter(loader)
    except OSError as error:
        former, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            traceback.clear_frames(error.__traceback__)
        finally:
            sys.unraisablehook = former
        raise


def _want_files(number: int) -> None:
    """Raises the limit of open files where so many more would not be allowed.

    Raises:
        OSError: it cannot be raised so far. Workers that have begun would fail in many tracebacks.
    """
    try:
        wanted = len(os.listdir("/proc/self/fd")) + number
    except FileNotFoundError:  # another system than Linux
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _death(batches: Any, error: Exception) -> Exception:
    """Returns `error`, or an error that names the signal by which a worker died."""
    workers: list[multiprocessing.Process] = getattr(batches, "_workers", [])
    gone = wait([worker.sentinel for worker in workers], PATIENCE) if workers else []
    for worker in workers:
        if worker.sentinel in gone:
            worker.join(PATIENCE)  # this, too, breaks before it has an exit code
        if (worker.exitcode or 0) < 0:
            how = signal.strsignal(-worker.exitcode)
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: {how}.")
    return error


def as_raised(fault: BrokenImageError | UserError) -> UserError:
    """Returns the exception that ends the run for a fault that a worker returned as a value."""
    if isinstance(fault, UserError):
        return fault
    remedy = "mend or remove the file (python -m tools.check_images lists all broken ones)"
    if fault.can_be_skipped:
        remedy += ", or train with --skip-bad-images"
    return UserError(f"{fault}; {remedy}", EXIT_FAILED)

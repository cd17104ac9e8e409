"""Turns faults from outside a run, such as missing memory, into one line each."""

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.system.errors import EXIT_FAILED, FEWER_FILES, TOO_MANY_FILES, UserError
from utils.system.stop_requests import StopRequest
from utils.system.streams import output_as_log

NO_FILES_LEFT = ("Too many open files", "ancdata")  # as errors from a worker put it
# The CPU's allocator has no exception type of its own; these are its words, and its backends'.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "Cannot allocate memory",
)
LOST_PEER = ("peer", "gloo", "NCCL", "Broken pipe", "Timed out waiting", "process group")


@dataclass(frozen=True)
class Memory:
    """Says what decides a script's need of memory, in the words of its command line."""

    asked: str  # such as "-b 256"
    smaller: str  # what to give then: "a smaller -b or --img-size, or --amp bf16"
    in_workers: str = ""  # what besides their number spares loader workers: " or a smaller -b"
    workers: int | None = None  # how many there are, where that is known


@contextmanager
def in_one_line(memory: Memory, stop: StopRequest | None = None) -> Iterator[None]:
    """Turns faults from outside, raised within this context, into UserErrors (exit code 1).

    They are: no memory; no more files or processes; a loader worker that was killed (torch raises
    that wherever the main process happens to be when the news arrives, so no smaller place could
    catch it); a process of the run that ended while this one waited for it.

    Args:
        memory: to name in the remedy.
        stop: of a run that trains, and can be resumed. Where it says that the run was asked to
            stop, its exit code is that of stopping. Such a run goes on where stdout, its log,
            cannot be written.
    """
    again = "start again" if stop is None else "go on with --resume auto"
    try:
        with nullcontext() if stop is None else output_as_log():
            yield
    except MemoryError:
        raise _out_of_memory(memory) from None
    except OSError as error:
        if error.errno in TOO_MANY_FILES or any(sign in str(error) for sign in NO_FILES_LEFT):
            raise _too_many_files(memory) from None
        if error.errno == errno.EAGAIN:
            raise UserError(
                "no more processes allowed: use fewer workers (-j), or raise the limit (ulimit -u)",
                EXIT_FAILED,
            ) from None
        raise
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in NO_FILES_LEFT):
            raise _too_many_files(memory) from None
        if is_out_of_memory(error):
            raise _out_of_memory(memory) from None
        if "DataLoader worker" in text:
            raise _dead_worker(text, memory, again) from None
        if dist.is_initialized() and any(sign in text for sign in LOST_PEER):
            # Asked to stop, too? The launcher asks the others as soon as one has been killed.
            raise UserError(
                "another process of this run ended or hangs (its own lines say why); "
                f"{'' if stop is None else 'nothing saved is lost: '}{again}",
                stop.exit_code if stop else EXIT_FAILED,
            ) from None
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that Python, a device or the CPU's allocator had no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def _out_of_memory(memory: Memory) -> UserError:
    return UserError(f"out of memory with {memory.asked}: give {memory.smaller}", EXIT_FAILED)


def _too_many_files(memory: Memory) -> UserError:
    remedy = "raise the limit (ulimit -n)" if memory.workers == 0 else FEWER_FILES
    return UserError(f"too many open files: {remedy}", EXIT_FAILED)


def _dead_worker(text: str, memory: Memory, again: str) -> UserError:
    if "Bus error" in text or "shared memory" in text:
        return UserError(
            "a loader worker found no room in shared memory (/dev/shm): enlarge it (docker: "
            f"--shm-size), or use fewer workers (-j); {again}",
            EXIT_FAILED,
        )
    how = next((f" by {s.name}" for s in signal.Signals if _described(s) in text), "")
    return UserError(
        f"a loader worker was killed{how} (out of memory?): use fewer workers (-j)"
        f"{memory.in_workers}; {again}",
        EXIT_FAILED,
    )


def _described(signum: signal.Signals) -> str:
    return f"killed by signal: {signal.strsignal(signum)}."

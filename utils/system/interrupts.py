"""Answers Ctrl-C with one line: while a script still imports, while it runs, and as it ends.

`utils.system.script_start` sets the handler for the imports, PyTorch above all, which take seconds.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from utils.system.errors import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[2]


class _Process:
    """Holds which process answers Ctrl-C (its children have nothing to say), and whether it has."""

    number = os.getpid()
    has_said = False


def say() -> None:
    """Prints the line on a Ctrl-C, once; in a handler, where a buffered stream may be in use."""
    if not _Process.has_said:
        _Process.has_said = True
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")


def leave(signum: int, frame: FrameType | None) -> None:
    """Ends the process at once. Files appear whole or not at all, and workers end with it."""
    if os.getpid() == _Process.number:
        say()
    os._exit(EXIT_INTERRUPTED)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, once: a further Ctrl-C meets `leave`, in whatever clears up."""
    if os.getpid() != _Process.number:
        os._exit(EXIT_INTERRUPTED)
    signal.signal(signal.SIGINT, leave)
    raise KeyboardInterrupt


def came() -> bool:
    """Returns whether Ctrl-C has interrupted this process."""
    return signal.getsignal(signal.SIGINT) is leave


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise one KeyboardInterrupt within this context, and end a script after it.

    Where it was ignored already (a job in the background), it stays ignored.
    """
    former = signal.getsignal(signal.SIGINT)
    if former == signal.SIG_IGN:
        yield
        return
    _Process.number, _Process.has_said = os.getpid(), False
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, leave if runs_a_script() else former)


def runs_a_script() -> bool:
    """Returns whether this process is a script of ours, not a test or a notebook."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().parent in (ROOT, ROOT / "tools")

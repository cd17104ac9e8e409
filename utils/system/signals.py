"""Answers signals: Ctrl-C ends a script with one line; a run that trains saves before it ends."""

import contextlib
import os
import signal
import stat
from types import FrameType

from utils.system.errors import EXIT_INTERRUPTED, EXIT_STOPPED

SCRIPT = os.getpid()  # answers Ctrl-C; its children have nothing to say


def leave(signum: int, frame: FrameType | None) -> None:
    """Ends the process at once. Files appear whole or not at all, and workers end with it."""
    _say()
    os._exit(EXIT_INTERRUPTED)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, so that a script clears up; a further Ctrl-C ends it at once."""
    signal.signal(signal.SIGINT, _leave_silently)
    if os.getpid() != SCRIPT:
        os._exit(EXIT_INTERRUPTED)
    _say()
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Returns whether Ctrl-C has ended what this process does, whatever a library made of it."""
    return signal.getsignal(signal.SIGINT) is _leave_silently


def _leave_silently(signum: int, frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def _say() -> None:
    """Prints the line; not by print, as a handler may run while a buffered stream is in use."""
    if os.getpid() == SCRIPT:
        with contextlib.suppress(OSError):
            clear = b"\r\x1b[K" if os.isatty(2) else b""  # of a bar's line
            os.write(2, clear + b"interrupted\n")


class StopRequest:
    """Notes signals that ask the run to end, instead of dying from them.

    They are SIGTERM, SIGUSR1 (job schedulers' warning), SIGHUP (the terminal or the ssh connection
    is gone) and Ctrl-C. The loop finishes its step, saves and leaves with `exit_code`. A second
    Ctrl-C interrupts at once. Where SIGHUP was ignored already (`nohup`), it stays ignored. Use as
    a context manager: the former handlers come back on leaving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "StopRequest":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        noted = [s for s in self.SIGNALS if not (s == signal.SIGHUP and ignored)]
        self._former = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._former.items():
            if signal.getsignal(signum) == self._note:  # a second Ctrl-C has another by then
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            interrupt(signum, frame)
        if signum == signal.SIGHUP:
            _leave_terminal()
        self.signum = signum

    def __bool__(self) -> bool:
        return self.signum is not None

    def on_main(self, is_main: bool) -> bool:
        """Returns whether rank 0, whose word counts within an evaluation, was asked to stop."""
        return is_main and bool(self)

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signum == signal.SIGINT else EXIT_STOPPED


def _leave_terminal() -> None:
    """Prints no more where the terminal is gone: a line to it would end the run unsaved."""
    for number in (1, 2):
        if not stat.S_ISREG(os.fstat(number).st_mode):
            lead_to_nowhere(number)


def lead_to_nowhere(number: int) -> None:
    """Lets what is written to this open file from now on be lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)

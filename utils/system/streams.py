"""Keeps stdout and stderr usable: where one is closed, full or has no reader, no traceback follows.

A program whose output is its result ends with one line when that cannot be written. A training
run, whose result is its checkpoints, says it once and goes on: see `output_as_log`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from utils.system.errors import EXIT_FAILED, UserError


class GuardedStream:
    """Passes text on to a stream; after its first fault it writes to nowhere.

    Args:
        stream: stdout or stderr.
        name: of it, for the message.
        is_log: whether the program can do without it; otherwise a fault ends the program.
    """

    def __init__(self, stream: TextIO, name: str, is_log: bool):
        self.stream, self.name, self.is_log = stream, name, is_log
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        """Writes the text, as a stream does.

        Raises:
            BrokenPipeError: nobody reads it any more.
            UserError: it cannot be written.
        """
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes what waits; raises as `write`, but not for what was lost and told before."""
        if self.fault is None:
            self._attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _attempt(self, act: Callable[..., object], *values: str) -> None:
        if self.fault is None:
            try:
                act(*values)
                return
            except OSError as error:
                self.fault = error
                _lead_to_nowhere(self.stream)
            if self.is_log and self.name == "stdout":
                why = self.fault.strerror
                print(f"! stdout: {why}; what follows is not shown", file=sys.stderr, flush=True)
        if self.is_log:
            return
        if isinstance(self.fault, BrokenPipeError):
            raise self.fault
        raise UserError(
            f"stdout: {self.fault.strerror}; make room, or send the output elsewhere", EXIT_FAILED
        )


@contextmanager
def guarded() -> Iterator[None]:
    """Guards stdout and stderr within this context, and opens them where they were closed."""
    former = sys.stdout, sys.stderr
    out = _opened(sys.stdout, 1)
    err = _opened(sys.stderr, 2)
    for stream in (out, err):
        if hasattr(stream, "reconfigure"):  # names of files that a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, GuardedStream(out, "stdout", is_log=False))
    sys.stderr = cast(TextIO, GuardedStream(err, "stderr", is_log=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former


@contextmanager
def output_as_log() -> Iterator[None]:
    """Lets what is done within this context go on where stdout cannot be written.

    One line on stderr says so.
    """
    stream = sys.stdout
    if not isinstance(stream, GuardedStream):
        yield
        return
    former, stream.is_log = stream.is_log, True
    try:
        yield
    finally:
        stream.is_log = former


def _opened(stream: TextIO | None, number: int) -> TextIO:
    """Returns the stream; where it was closed (`>&-`), one that leads to nowhere.

    Its number is taken, too: a checkpoint opened under it would get what libraries print.
    """
    if stream is not None:
        return stream
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
    return open(os.devnull, "w", encoding="utf-8")


def _lead_to_nowhere(stream: TextIO) -> None:
    """Sends on what still waits in the stream, and what libraries write to it, to nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
    except (OSError, ValueError):
        pass  # a stream of a test, without a file

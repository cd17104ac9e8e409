"""Defines the errors that end a run with one line instead of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FAILED = 1  # something outside the program gave way: a worker, memory, a disk
EXIT_BAD_INPUT = 2  # argparse's own code for a bad flag, used for bad files and data too
EXIT_NON_FINITE = 3  # the loss or the gradient norm was not a finite number
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
EXIT_STOPPED = 143  # SIGTERM, SIGUSR1 or SIGHUP: saved and stopped on request

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
FEWER_FILES = "use fewer workers (-j), or raise the limit (ulimit -n)"


class UserError(Exception):
    """Means a fault that the user can mend. The message is one line: the fault and the remedy."""

    def __init__(self, message: str, exit_code: int = EXIT_BAD_INPUT):
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Turns the ValueErrors of `models`, which are one line each, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None

"""Defines the errors that end a run with one line instead of a traceback."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FAILED = 1  # something outside the program gave way: a worker, memory, a disk
EXIT_BAD_INPUT = 2  # argparse's own code for a bad flag, used for bad files and data too
EXIT_NON_FINITE = 3  # the loss or the gradient norm was not a finite number
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
EXIT_STOPPED = 143  # SIGTERM, SIGUSR1 or SIGHUP: saved and stopped on request

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
FEWER_FILES = "use fewer workers (-j), or raise the limit (ulimit -n)"


BAD_PATHS = {  # what a user named cannot be right
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file stands where the path wants a folder; give another path",
    errno.ELOOP: "its links lead in a circle; give another path",
}
FAILURES = {  # what holds a path gave way
    errno.EACCES: "mend its rights, or choose another place",
    errno.EPERM: "mend its rights, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EIO: "see to the storage, and start again",
    errno.ESTALE: "see to the storage, and start again",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "raise the limit of the system, or end other programs",
}


class UserError(Exception):
    """Means a fault that the user can mend. The message is one line: the fault and the remedy."""

    def __init__(self, message: str, exit_code: int = EXIT_BAD_INPUT):
        super().__init__(message)
        self.exit_code = exit_code


def of_system(error: OSError) -> UserError | None:
    """Returns a fault of the file system as one line with its remedy; None for another fault.

    A path in it is named.
    """
    known = {**BAD_PATHS, **FAILURES}
    if error.errno not in known:
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    code = EXIT_BAD_INPUT if error.errno in BAD_PATHS else EXIT_FAILED
    return UserError(f"{where}{error.strerror}; {known[error.errno]}", code)


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Turns the ValueErrors of `models`, which are one line each, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None

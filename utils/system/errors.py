"""Defines the errors that end a run with one line instead of a traceback."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FAILED = 1  # something outside the program gave way: a worker, memory, a disk
EXIT_BAD_INPUT = 2  # argparse's own code for a bad flag, used for bad files and data too
EXIT_NON_FINITE = 3  # the loss or the gradient norm was not a finite number
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
EXIT_STOPPED = 143  # SIGTERM, SIGUSR1 or SIGHUP: saved and stopped on request

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_FLAGS = "arch|attention|backbone|identity_start|ksize|legacy|norm|num_classes|trainable_layers"
ARGUMENT = re.compile(rf"`({_FLAGS})=([^`]*)`")  # marked, as a file's name may look like one
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
    """Turns the ValueErrors of `models`, which are one line each, into UserErrors.

    `models` names arguments, and whoever types a command reads the flags: see `as_flags`.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{as_flags(str(error))}") from None


def as_flags(message: str) -> str:
    """Returns a message of `models` with its arguments written as flags.

    What stands between backticks is meant: num_classes=4 becomes --num-classes 4, and legacy=True
    becomes --legacy.
    """

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')}{'' if found[2] == 'True' else f' {found[2]}'}"

    return ARGUMENT.sub(flag, message)

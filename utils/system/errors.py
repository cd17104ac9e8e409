"""Defines the errors that end a run with one line instead of a traceback."""

import errno
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

EXIT_FAILED = 1  # something outside the program gave way: a worker, memory, a disk
EXIT_BAD_INPUT = 2  # argparse's own code for a bad flag, used for bad files and data too
EXIT_NON_FINITE = 3  # the loss or the gradient norm was not a finite number
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it
EXIT_STOPPED = 143  # SIGTERM, SIGUSR1 or SIGHUP: saved and stopped on request

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
FEWER_FILES = "use fewer workers (-j), or raise the limit (ulimit -n)"
_FLAGS = "arch|attention|backbone|identity_start|ksize|legacy|norm|num_classes|trainable_layers"
ARGUMENT = re.compile(rf"`({_FLAGS})=([^`]*)`")  # marked, as a file's name may look like one


class UserError(Exception):
    """Means a fault that the user can mend. The message is one line: the fault and the remedy."""

    def __init__(self, message: str, exit_code: int = EXIT_BAD_INPUT):
        super().__init__(message)
        self.exit_code = exit_code


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

    def flag(argument: re.Match[str]) -> str:
        value = "" if argument[2] == "True" else f" {argument[2]}"
        return f"--{argument[1].replace('_', '-')}{value}"

    return ARGUMENT.sub(flag, message)


def require(packages: Sequence[str], purpose: str, install: str) -> None:
    """Refuses to go on when a package that `purpose` needs is not installed.

    Args:
        packages: names as they are imported.
        purpose: what needs them, such as "--to onnx".
        install: what pip takes, such as "-r requirements-export.txt".

    Raises:
        UserError: names the missing packages and the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install {install}")

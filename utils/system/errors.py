"""Defines the errors that end a run with one line instead of a traceback."""

import errno
import importlib.util
from collections.abc import Iterator, Sequence
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
    """Turns the ValueErrors of `models`, which are one line each, into UserErrors.

    An ArgumentError of theirs carries the arguments in its message: `num_classes=4` becomes
    --num-classes 4, and `legacy=True` becomes --legacy.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, value in getattr(error, "arguments", {}).items():
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            message = message.replace(f"`{name}={value}`", flag)
        raise UserError(f"{prefix}{message}") from None


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

"""Where a tool's files go: to a folder of their own, never over somebody's files."""

from pathlib import Path

from utils import run_folder
from utils.errors import UserError


def check_free(folder: str | None) -> None:
    """Ends a tool before its work when --output is in use.

    Raises:
        UserError: `folder` is a file, or a folder with something in it.
    """
    if folder is None:
        return
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{folder}: is in use; choose a new --output, so that nothing is lost")
    if path.exists() and not path.is_dir():
        raise UserError(f"{folder}: is a file; --output wants a folder")


def new_folder(name: str, output: str | None = None) -> Path:
    """Makes `output`, or the first free `runs/<name>-N`; see `run_folder.create`."""
    check_free(output)
    return run_folder.create(name, output)

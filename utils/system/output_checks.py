"""Refuses an --output or other target before a tool's work, not after it."""

import os
from pathlib import Path

from utils.system.errors import UserError


def check_free(folder: str | None) -> None:
    """Refuses an --output folder that is in use, or cannot be made.

    Raises:
        UserError: `folder` is a file, a folder with something in it, or where nobody may write.
    """
    if folder is None:
        return
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{folder}: is in use; choose a new --output, so that nothing is lost")
    if path.exists() and not path.is_dir():
        raise UserError(f"{folder}: is a file; --output wants a folder")
    _check_rights(next(p for p in (path, *path.absolute().parents) if os.path.exists(p)), folder)


def check_new_file(file: str | None) -> None:
    """Refuses a target file that exists already, or cannot be made.

    Raises:
        UserError: `path` exists or cannot be written, or its folder is missing.
    """
    if file is None:
        return
    if os.path.lexists(file):
        raise UserError(f"{file}: exists already; choose another name")
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{file}: there is no folder {folder}; make it, or choose another name")
    _check_rights(folder, file)


def check_own_file(target: Path, mark: str) -> None:
    """Refuses to replace a file that a program has not written itself.

    Args:
        mark: what stands in the first 200 bytes of its own files.

    Raises:
        UserError: `target` is a foreign file, a link or a folder, or lies in no folder.
    """
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise UserError(f"{target}: is no plain file; choose another --output")
    if not target.exists():
        check_new_file(str(target))
        return
    try:
        with open(target, "rb") as file:
            start = file.read(200)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; choose another --output") from None
    if mark.encode() not in start:
        raise UserError(
            f"{target}: is no page of this tool and stays as it is; choose another --output"
        )


def _check_rights(folder: Path, wanted: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{wanted}: cannot write to {folder}; mend its rights, or choose another")

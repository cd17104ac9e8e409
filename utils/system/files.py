"""Writes files that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from utils.system.errors import EXIT_FAILED, UserError

STORAGE = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT)  # it gave way


def write_atomically(
    path: str | Path, data: bytes | memoryview, retire_to: str | Path | None = None
) -> None:
    """Writes `data` to a temporary neighbour, flushes it to the disk, and renames it to `path`.

    A reader sees the old file or the new one; a crash, even of the machine, leaves one of the two.

    Args:
        retire_to: where the file that now stands at `path` goes, instead of being replaced. Both
            names hold a file at any time, and never the same one: the new file takes `path` while
            the old one is kept by a third name. (Where there are no hard links the old one moves
            first, and `path` is empty for a moment.)

    Raises:
        UserError: no room (says how much is needed), read-only or missing folder; `path` is as it
            was.
    """
    path = Path(path)
    temporary = _temporary(path)
    kept = path.with_name(f".{path.name}.kept.tmp-{os.getpid()}")
    linked = moved = False
    try:
        with _new_file(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if retire_to is not None and path.exists():
            linked = _link(path, kept)
            if not linked:
                os.replace(path, retire_to)
                moved = True
        os.replace(temporary, path)
        if linked:
            os.replace(kept, retire_to)
        _fsync_folder(path.parent)
    except OSError as error:
        # What undoes the rest may fail as well, on a disk that has just become read-only, say.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if linked:
                os.replace(kept, path)
                kept.unlink(missing_ok=True)  # two names of one file are left as they are
            elif moved and not path.exists():
                os.replace(retire_to, path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"no room to write {path} ({error.strerror}): {len(data) / 1e6:,.1f} MB needed, "
                f"{free / 1e6:,.1f} MB free; what was written before it is whole. Make room, and "
                "resume",
                EXIT_FAILED,
            ) from None
        remedy = "choose another place, or mend its rights"
        if error.errno in STORAGE:
            remedy = (
                "what was written before it is whole. See to the storage, and start again (a run: "
                "with --resume auto)"
            )
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}", EXIT_FAILED) from None


def remove_leftovers(folder: str | Path) -> None:
    """Removes temporary files that a killed process left in `folder`.

    A folder with such a name is none of ours: it stays.
    """
    for path in Path(folder).glob(".*.tmp-*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Returns the name of a temporary neighbour, one that no folder has."""
    names = (f".{path.name}.tmp-{os.getpid()}{more}" for more in ("", *range(1000, 10_000)))
    return next(p for p in map(path.with_name, names) if p.is_symlink() or not p.is_dir())


def _new_file(path: Path) -> BinaryIO:
    """Opens a file that was not there, so that a link left under its name is never followed.

    Raises:
        OSError: a folder has the name, or no file can be made there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except FileExistsError:  # of a killed process that had our number; a link goes, not its target
        path.unlink()
        handle = os.open(path, flags, 0o666)
    return os.fdopen(handle, "wb")


def _link(path: Path, other: Path) -> bool:
    try:
        os.link(path, other)
    except OSError:  # file systems without hard links
        return False
    return True


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # makes the rename itself survive a power cut
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems without it
            raise
    finally:
        os.close(handle)

"""Writes files whole or not at all, reads small ones, and checks targets before any work."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import printable

STORAGE = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT)  # it gave way
STORAGE_REMEDY = (
    "what was written before it is whole. See to the storage, and start again (a run: with "
    "--resume auto)"
)
LARGEST = 16_000_000  # bytes of a file that a person writes: a thousandfold of what is usual


def write_atomically(
    path: str | Path, data: bytes | memoryview, retire_to: str | Path | None = None
) -> None:
    """Writes `data` to a temporary neighbour, flushes it to the disk, and renames it to `path`.

    A reader sees the old file or the new one; a crash, even of the machine, leaves one of the two.

    Args:
        retire_to: where the file that now stands at `path` goes, instead of being replaced. Both
            names hold a file at any time, and never the same one: the new file takes `path` while
            the old one has a third name. (Where there are no hard links the old one moves
            first, and `path` is empty for a moment.)

    Raises:
        UserError: no room (says how much is needed), read-only or missing folder; `path` is as it
            was.
    """
    path = Path(path)
    ending = f"tmp-{secrets.token_hex(8)}"  # nobody else has this name, and none can be prepared
    temporary, former = (path.with_name(f".{path.name}.{part}{ending}") for part in ("", "kept."))
    retired = path if retire_to is None else Path(retire_to)
    linked = moved = False
    try:
        with _new_file(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if retire_to is not None and path.exists():
            try:
                os.link(path, former)
                linked = True
            except OSError:  # file systems without hard links
                os.replace(path, retired)
                moved = True
        os.replace(temporary, path)
        if linked:
            os.replace(former, retired)
        _fsync_folder(path.parent)
    except OSError as error:
        # What undoes the rest may fail as well, on a disk that has just become read-only, say.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if linked:
                os.replace(former, path)
                former.unlink(missing_ok=True)  # two names of one file are left as they are
            elif moved and not path.exists():
                os.replace(retired, path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"no room to write {path} ({error.strerror}): {len(data) / 1e6:,.1f} MB needed, "
                f"{free / 1e6:,.1f} MB free; what was written before it is whole. Make room, and "
                "resume",
                EXIT_FAILED,
            ) from None
        gave_way = error.errno in STORAGE
        remedy = STORAGE_REMEDY if gave_way else "choose another place, or mend its rights"
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}", EXIT_FAILED) from None


def remove_leftovers(folder: str | Path) -> None:
    """Removes temporary files that a killed process left in `folder`.

    A folder with such a name is none of ours: it stays.
    """
    for path in Path(folder).glob(".*.tmp-*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def _new_file(path: Path) -> BinaryIO:
    """Opens a file that was not there, so that a link under its name is never followed.

    Raises:
        OSError: something has the name, or no file can be made there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # makes the rename itself survive a power cut
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems without it
            raise
    finally:
        os.close(handle)


def read_text(path: str | Path, instead: str) -> str:
    """Returns the text of a file in UTF-8, with or without a byte-order mark.

    Args:
        instead: what the user is to give, for the message.

    Raises:
        UserError: no such file, no text, or too large.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"{printable(path)}: {why}; give {instead}") from None
    if len(data) > LARGEST:
        raise UserError(f"{printable(path)}: more than {LARGEST:,} bytes; give {instead}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{printable(path)}: no text in UTF-8; give {instead}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe to which nobody writes is empty, not waited for."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(handle, True)  # one with a writer is read to its end
    return handle


def read_json(path: str | Path, instead: str) -> Any:
    """Returns what a JSON file holds; `instead` as in `read_text`.

    Raises:
        UserError: as `read_text`; no JSON; an object that names one thing twice; or a whole number
            of more than 64 bits.
    """
    text = read_text(path, instead)
    try:
        return json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError:
        why = "nested too deep"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{printable(path)}: no usable JSON ({printable(why)}); give {instead}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return values


def _whole(text: str) -> int:
    digits = text.lstrip("-")
    if len(digits) > 20 or int(digits) >= 2**64:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(text)


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
    check_writable(path)


def check_writable(folder: Path) -> None:
    """Refuses a folder that nobody may write to, or that cannot be made.

    Raises:
        UserError: names the part of its path that stands in the way.
    """
    whole = folder.absolute()
    there = next(part for part in (whole, *whole.parents) if os.path.lexists(part))
    for name in whole.parts[len(there.parts) :]:
        try:
            os.lstat(there / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # a name that is too long, be its folder there or not
            raise UserError(f"{folder}: {error.strerror}; choose another name") from None
    _check_rights(there, str(folder))


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


def _check_rights(folder: Path, target: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{target}: cannot write to {folder}; mend its rights, or choose another")

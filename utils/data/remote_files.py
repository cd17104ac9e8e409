"""Reads bytes, whole or by range, from local files or from a store that fsspec knows (s3://, …).

fsspec comes with torch; the package for a particular store (s3fs, gcsfs, aiohttp) is the user's to
install.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from utils.system.errors import EXIT_FAILED, UserError

OPEN_FILES = 256  # kept open by each process, well below the usual limit of 1,024
PAUSES = (1, 4, 16)  # seconds before a request to a store is made again
SILENCE = 60.0  # seconds without a byte after which a web server counts as dead
T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Returns whether `path` is a URL."""
    return "://" in path


def sizes(folder: str, ending: str) -> dict[str, int | None]:
    """Returns the files of a folder whose name has this ending, sorted, with their sizes in bytes.

    None for a size that the store does not tell; nothing at all where there is no such folder, or
    a store (a plain web server) that does not list one.

    Raises:
        UserError: the store does not answer, or wants a package.
    """
    if is_remote(folder):
        entries = _ask(folder, lambda fs, path: fs.ls(path, detail=True), missing=[])
        found = {e["name"].rstrip("/").rpartition("/")[2]: e["size"] for e in entries}
    else:
        try:
            with os.scandir(folder) as entries:
                found = {e.name: e.stat().st_size for e in entries if e.is_file()}
        except OSError:
            return {}
    names = sorted(n for n in found if n.lower().endswith(ending) and not n.startswith("."))
    return {name: found[name] for name in names}


def read_whole(path: str) -> bytes | None:
    """Returns the contents of a small file; None where there is none.

    Raises:
        UserError: the store does not answer, or the file cannot be read.
    """
    if is_remote(path):
        return _ask(path, lambda fs, inner: fs.cat_file(inner), missing=None)
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check its permissions") from None


def read_range(path: str, start: int, size: int) -> bytes:
    """Returns `size` bytes from `start` on; of a local file fewer where it ends.

    Raises:
        OSError: a local file that cannot be read.
        UserError: a store that does not answer, or answers with another number of bytes.
    """

    def request(fs, inner: str) -> bytes:
        data = fs.cat_file(inner, start=start, end=start + size)
        if len(data) > size:  # a plain server that knows no ranges sends all of it
            raise UserError(
                f"{path}: {size:,} bytes were asked for and {len(data):,} came: the server ignores "
                "ranges; copy the shards to a disk, or serve them otherwise",
                EXIT_FAILED,
            )
        if len(data) < size:
            raise OSError(f"sent {len(data):,} of {size:,} bytes")
        return data

    if is_remote(path):
        return _ask(path, request)
    return os.pread(_opened(path).fileno(), size, start)  # which moves no shared file position


def read_through(path: str, read: Callable[[BinaryIO], T]) -> T:
    """Returns what `read` makes of the opened file; a store's file may be opened more than once.

    Raises:
        OSError, UserError: see `read_range`, and those of `read`.
    """

    def request(fs, inner: str) -> T:
        with fs.open(inner, "rb") as file:
            return read(file)

    if is_remote(path):
        return _ask(path, request)
    with open(path, "rb") as file:
        return read(file)


def close_files() -> None:
    """Closes open files, which would still show contents that have been replaced since."""
    _opened.cache_clear()


@functools.lru_cache(OPEN_FILES)
def _opened(path: str) -> BinaryIO:
    # Opening costs a network file system a round trip; one less for each image is what large files
    # are for. The one that is dropped from the cache is closed with its last reference.
    return open(path, "rb", buffering=0)


@functools.lru_cache(4096)
def _filesystem(url: str, _process: int) -> tuple:
    import fsspec  # here: it is of no use to local runs

    try:
        options = {}
        if url.startswith(("http://", "https://")):
            # aiohttp's own limit is five minutes for a whole answer, however large it is.
            import aiohttp

            limit = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options = {"client_kwargs": {"timeout": limit}}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:  # that names the package: "Install s3fs to access S3"
        raise UserError(f"{url}: {error}".splitlines()[0] + " (pip install …)") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}".splitlines()[0]) from None


_NEEDED = object()


def _ask(url: str, request, missing: object = _NEEDED):
    """Calls `request(filesystem, path)`, again when it fails: a short fault of a store is no broken
    image.

    Raises:
        UserError: it failed every time, or no such file where `missing` gives nothing instead.
    """
    for pause in (*PAUSES, None):
        try:
            # Some stores (ftp://, zip://) are asked as soon as they are opened. By process: a
            # forked worker must not use its parent's connections.
            fs, path = _filesystem(url, os.getpid())
            return request(fs, path)
        except (FileNotFoundError, NotADirectoryError):
            if missing is not _NEEDED:
                return missing
            raise UserError(f"{url}: no such file; was it removed?", EXIT_FAILED) from None
        except UserError:  # the fault of what is stored, and the same the next time
            raise
        except Exception as error:  # every store has errors of its own
            if pause is None:
                reason = f"{type(error).__name__} {error}".splitlines()[0].rstrip()
                raise UserError(
                    f"{url}: {reason} ({len(PAUSES) + 1} tries); check the address, the rights and "
                    "the network, and go on with --resume auto",
                    EXIT_FAILED,
                ) from None
        time.sleep(pause)

"""Finds each image in a folder of tar shards, by an index that is made once and stored with them.

The shards are webdataset's: tar files in which `KEY.jpg` (or another image ending) has its class
number in `KEY.cls`. With the place of each image known they are read like files: any image at any
time, so that order, augmentation and exact resumption are those of class folders. (webdataset
itself streams them through a shuffle buffer, whose contents an interrupted run cannot find again.)
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from utils.data import remote_files
from utils.data.decoding import EXTENSIONS
from utils.system.errors import UserError
from utils.system.files import write_atomically
from utils.system.text import printable

NAME = "shard-index.npz"
VERSION = 1
BLOCK = 512  # of a tar file
MOST_CLASSES = 1_000_000  # a larger class number is a fault: every number up to it takes memory
MEMBER = np.dtype(
    [
        ("shard", np.int32),
        ("offset", np.int64),  # of the image's bytes
        ("size", np.int64),
        ("header", np.uint32),  # CRC-32 of the block in front of them, which names them
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """Holds the places of the images of some shards, in the order of the shards."""

    shards: tuple[str, ...]  # file names
    sizes: tuple[int, ...]  # of the shards, in bytes
    names: np.ndarray  # (n,) bytes, of the images inside of the shards
    labels: np.ndarray  # (n,) int64, as in their .cls
    members: np.ndarray  # (n,) MEMBER
    ignored: dict[str, int]  # what was passed over, and how often

    def fits(self, listed: dict[str, int | None]) -> bool:
        """Returns whether the index is of these shards. Where a store lists no files, it is
        trusted: each image is compared with its header when it is read.
        """
        return not listed or (
            tuple(listed) == self.shards
            and all(n in (None, own) for n, own in zip(listed.values(), self.sizes, strict=True))
        )

    def is_sound(self) -> bool:
        """Returns whether each image has a class and lies inside a shard: a stranger may have
        written it.

        Raises:
            Exception: arrays of other kinds have several.
        """
        shard, offset, size = (self.members[part] for part in ("shard", "offset", "size"))
        shapes = {self.names.shape, self.labels.shape, self.members.shape}
        if shapes != {(len(self.names),)} or len(self.names) == 0:
            return False
        if self.names.dtype.kind != "S" or self.labels.dtype != np.int64:
            return False
        if len(self.shards) != len(self.sizes) or any(map(os.path.dirname, self.shards)):
            return False
        if not 0 <= self.labels.min() <= self.labels.max() < MOST_CLASSES:
            return False
        if not 0 <= shard.min() <= shard.max() < len(self.shards):
            return False
        room = np.array(self.sizes, np.int64)[shard] - offset  # no sum, which could overflow
        return bool(((offset >= BLOCK) & (size >= 0) & (room >= size)).all())

    def to_bytes(self) -> bytes:
        about = {
            "version": VERSION,
            "shards": self.shards,
            "sizes": self.sizes,
            "ignored": self.ignored,
        }
        file = io.BytesIO()
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            names=self.names,
            labels=self.labels,
            members=self.members,
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardIndex | None":
        """Reads an index; returns None for one that is damaged or of another version."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                about = json.loads(held["about"].tobytes())
                if about["version"] != VERSION or held["members"].dtype != MEMBER:
                    return None
                found = cls(
                    tuple(about["shards"]),
                    tuple(about["sizes"]),
                    held["names"],
                    held["labels"],
                    held["members"],
                    about["ignored"],
                )
                return found if found.is_sound() else None
        except Exception:  # numpy, zipfile and json each have several
            return None


def find_index(root: str) -> ShardIndex | None:
    """Returns the index of a folder's shards, made if there is none; None where there are no
    shards.

    It is kept beside the shards, or, where that cannot be written, in the user's cache folder.

    Raises:
        UserError: a shard that is damaged, or no webdataset; an index that is, where no shards are
            listed.
    """
    remote_files.close_files()
    listed = remote_files.sizes(root, ".tar")
    cached = _cache_file(root)
    if (found := _stored(root, cached, listed)) is not None or not listed:
        return found
    with _alone(root, cached):  # the other processes of a run wait for the first one's index
        if (found := _stored(root, cached, listed)) is None:
            found = make_index(root, listed)
            _store(root, cached, found.to_bytes())
    return found


def make_index(root: str, listed: dict[str, int | None]) -> ShardIndex:
    """Reads the headers of all shards; of shards in a store, every byte.

    Raises:
        UserError: see `find_index`.
    """
    names: list[bytes] = []
    labels: list[int] = []
    members: list[tuple[int, int, int, int]] = []
    sizes: list[int] = []
    ignored: Counter[str] = Counter()
    bar = tqdm(listed, desc="indexing", unit="shard", disable=None)
    for number, shard in enumerate(bar):
        place = f"{root}/{shard}"
        try:
            contents = remote_files.read_through(place, partial(_contents, place=place))
        except OSError as error:
            raise UserError(f"{printable(place)}: {error.strerror or error}") from None
        images, classes, size, passed_over = contents
        sizes.append(size)
        ignored += passed_over
        for key, name, member in images:
            if key not in classes:
                ignored["image without .cls"] += 1
                continue
            names.append(os.fsencode(name))
            labels.append(classes[key])
            members.append((number, *member))
    if not names:
        raise UserError(
            f"{printable(root)}: no image with its class number beside it (KEY.jpg and KEY.cls) in "
            f"{len(listed)} tar files; python -m tools.make_shards writes such shards"
        )
    return ShardIndex(
        tuple(listed),
        tuple(sizes),
        np.array(names),
        np.array(labels, np.int64),
        np.array(members, MEMBER),
        dict(ignored),
    )


def _contents(
    file: BinaryIO, place: str
) -> tuple[list[tuple[str, str, tuple[int, int, int]]], dict[str, int], int, Counter[str]]:
    """Returns of one shard: (key, name, place) of its images, class numbers by key, size, other
    files.
    """
    images, classes, ignored = [], {}, Counter()
    for name, content, offset, size, header in _members(file, place, ignored):
        key, ending = os.path.splitext(name)
        if content is not None:
            classes[key] = content
        elif ending.lower() in EXTENSIONS:
            images.append((key, name, (offset, size, header)))
        else:
            ignored[ending.lower() or "no ending"] += 1
    return images, classes, file.seek(0, os.SEEK_END), ignored


def _members(
    file, place: str, ignored: Counter[str]
) -> Iterator[tuple[str, int | None, int, int, int]]:
    """Yields (name, class number if it is a .cls, offset, size, CRC of the header) of each file."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (`file` is the caller's)
        for member in tar:
            name = member.name.removeprefix("./")
            if member.issparse() or not member.isfile():  # a sparse file lies there in pieces
                if name.lower().endswith(EXTENSIONS):
                    ignored["sparse" if member.issparse() else "link"] += 1
                continue
            if os.path.basename(name).startswith("."):
                ignored["hidden"] += 1
                continue
            file.seek(member.offset_data - BLOCK)
            header = zlib.crc32(file.read(BLOCK))
            content = None
            if name.endswith(".cls"):
                content = _class_number(file.read(min(member.size, BLOCK)), f"{place}:{name}")
            yield name, content, member.offset_data, member.size, header
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end, too
            raise tarfile.ReadError(f"no end mark behind {len(tar.members)} files")
    # tarfile lets the others pass where a sparse file's header holds no numbers.
    except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"{printable(place)}: damaged or cut short ({error}); copy or make it again"
        ) from None


def _class_number(text: bytes, name: str) -> int:
    try:
        number = int(text) if len(text) < BLOCK else -1
    except ValueError:
        number = -1
    if not 0 <= number < MOST_CLASSES:
        raise UserError(
            f"{printable(name)}: holds {text[:20]!r}, not the number of a class "
            f"(0 to {MOST_CLASSES - 1:,}); "
            "python -m tools.make_shards writes such numbers"
        )
    return number


def _stored(root: str, cached: Path, listed: dict[str, int | None]) -> ShardIndex | None:
    for place in (f"{root}/{NAME}", str(cached)):
        data = remote_files.read_whole(place)
        if data is not None:
            found = ShardIndex.from_bytes(data)
            if found is not None and found.fits(listed):
                return found
            if not listed and place != str(cached):  # nothing to make another from
                raise UserError(f"{printable(place)}: damaged or cut short; upload it again")
    return None


def _store(root: str, cached: Path, data: bytes) -> None:
    """Writes the index beside the shards, else in the cache, else nowhere (the next run makes it
    again).
    """
    if not remote_files.is_remote(root):
        with contextlib.suppress(UserError):
            return write_atomically(Path(root, NAME), data)
    with contextlib.suppress(UserError, OSError):
        cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(cached, data)


def _cache_file(root: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    where = root if remote_files.is_remote(root) else os.path.realpath(root)
    return home / "eca-net" / f"{hashlib.sha256(os.fsencode(where)).hexdigest()[:32]}.npz"


@contextlib.contextmanager
def _alone(root: str, cached: Path) -> Iterator[None]:
    """Lets one process in at a time, where the file system can lock files."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            if remote_files.is_remote(root):
                cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                root = str(cached.parent)
            handle = os.open(root, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield

"""Opens DATA, and reads tar shards as class folders: same classes, labels and order of images.

The shards are webdataset's: tar files in which `KEY.jpg` (or another image ending) has its class
number beside it, in `KEY.cls`. An index of the images' positions, made once and stored with the
shards, lets them be read like files: any image at any time. (webdataset itself streams them through
a shuffle buffer, whose contents an interrupted run cannot restore.) The order is by class name and
then by name, as in class folders, whatever shards the images lie in: a run on shards is bit for bit
the run on the folder that they were made from.

With their index, shards may lie in a store that fsspec knows (s3://, https://, …). fsspec comes
with torch; the package for a particular store (s3fs, gcsfs, aiohttp) is the user's to install.
"""

import contextlib
import functools
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from utils.data import image_folder
from utils.data.decoding import EXTENSIONS
from utils.data.image_folder import ImageFolder, count_names
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.text import printable

NAME = "shard-index.npz"
VERSION = 2  # 1 paired images with classes by their keys alone, not by neighbours
CLASSES = "classes.txt"
BLOCK = 512  # of a tar file
KEY = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)  # webdataset's: up to the first dot
MOST_CLASSES = 1_000_000  # a larger class number is a fault: every number up to it takes memory
MEMBER = np.dtype(
    [
        ("shard", np.int32),
        ("offset", np.int64),  # of the image's bytes
        ("size", np.int64),
        ("header", np.uint32),  # CRC-32 of the block in front of them, which names them
    ]
)
OPEN_FILES = 256  # of each process, well below the usual limit of 1,024


@dataclass(frozen=True)
class ShardIndex:
    """Holds the positions of the images of some shards, in the order of the shards."""

    shards: Mapping[str, int]  # file name → bytes
    names: np.ndarray  # (n,) bytes, of the images inside of the shards
    labels: np.ndarray  # (n,) int64, as in their .cls
    members: np.ndarray  # (n,) MEMBER
    ignored: dict[str, int]  # what was passed over, and how often

    def to_bytes(self) -> bytes:
        about = {"version": VERSION, "shards": self.shards, "ignored": self.ignored}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, about=text, names=self.names, labels=self.labels, members=self.members)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardIndex":
        """Reads an index.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                names, labels, members = (arrays[n] for n in ("names", "labels", "members"))
        except Exception:  # numpy, zipfile and json each have several
            about = {}
        if about.get("version") != VERSION:
            raise ValueError("damaged, cut short, or of another version")
        return cls(about["shards"], names, labels, members, about["ignored"])


@dataclass(frozen=True)
class Member:
    """Describes one image in a shard; `decoding.read_image` takes it in place of a path."""

    shard: str  # path or URL
    name: bytes
    offset: int
    size: int
    header: int  # CRC-32 of the tar header in front of it

    def __str__(self) -> str:
        return f"{self.shard}:{os.fsdecode(self.name)}"

    def read(self) -> bytes:
        """Returns the image's bytes.

        Raises:
            UserError: other bytes lie there than when the index was made, the shard cannot be read,
                or a store does not answer. No fault of the image's: no other is to replace it.
        """
        try:
            data = read_range(self.shard, self.offset - BLOCK, BLOCK + self.size)
        except OSError as error:
            remedy = "see to it, and go on with --resume auto"
            fault = f"{printable(self.shard)}: {error.strerror}; {remedy}"
            raise UserError(fault, EXIT_FAILED) from None
        if zlib.crc32(data[:BLOCK]) != self.header or len(data) != BLOCK + self.size:
            index = f"{os.path.dirname(self.shard)}/{NAME}"
            raise UserError(
                f"{printable(str(self))}: the shard has changed since its index was made, or the "
                f"server ignores ranges; put it back, or remove {printable(index)} and start again",
                EXIT_FAILED,
            )
        return data[BLOCK:]


@dataclass(frozen=True, kw_only=True)
class ShardFolder(ImageFolder):
    """Holds the images of the shards in one folder. `paths` are their names inside the shards."""

    shards: tuple[str, ...]  # file names
    members: np.ndarray  # (n,) MEMBER

    @property
    def where(self) -> str:
        number = f"{len(self.shards)} shard{'s' * (len(self.shards) > 1)}"
        return f"{printable(self.root)}, {number}{self.part}"

    def path(self, index: int) -> Member:
        shard, offset, size, header = self.members[index].item()
        return Member(f"{self.root}/{self.shards[shard]}", self.paths[index], offset, size, header)

    def take(self, indices: np.ndarray) -> "ShardFolder":
        return replace(super().take(indices), members=self.members[indices])


def in_shards(root: str) -> bool:
    """Returns whether the images in `root` are to be read from shards.

    Class folders come first: ImageNet's own archives are often left beside what was unpacked.
    """
    if is_remote(root):
        return True
    if not list_shards(root):
        return False
    with os.scandir(root) as entries:
        return not any(e.is_dir() and not e.name.startswith(".") for e in entries)


def scan(root: str, classes: Sequence[str] | None = None) -> ShardFolder:
    """Lists the images of the shards in a folder.

    Class names are the lines of `classes.txt`, in the order of the numbers in the shards, in that
    folder or the one above. Without such a file the numbers are the names.

    Args:
        root: the folder that holds the shards, or its URL.
        classes: the class names in label order; by default those of the shards.

    Raises:
        UserError: no shards, damaged ones, or a class that `classes` does not name.
    """
    root = root.rstrip("/") or "/"
    index = find_index(root)
    if index is None:
        raise UserError(
            f"{printable(root)}: no {NAME} there, by which shards in a store are read; upload it "
            "with them (python -m tools.make_shards writes it, and so does the first run on a copy)"
            if is_remote(root)
            else f"{printable(root)}: no tar shards there"
        )
    highest, listed = int(index.labels.max()), _class_names(root)
    named = listed is not None
    names = [str(number) for number in range(highest + 1)] if listed is None else listed
    if highest >= len(names):
        raise UserError(
            f"{printable(root)}: an image has the class number {highest} (they count from 0), and "
            f"{CLASSES} has {len(names)} names; give it a line for every class"
        )
    classes = tuple(names if classes is None else classes)
    label_of = {name: label for label, name in enumerate(classes)}
    present = [names[number] for number in np.unique(index.labels).tolist()]
    if unknown := [name for name in present if name not in label_of]:
        remedy = "" if named else f"; write the names of the numbers into a {CLASSES} beside it"
        raise UserError(
            f"{printable(root)}: {count_names(unknown)} not among the {len(classes)} known classes"
            f"{remedy or '; labels go by name'}"
        )
    ranks = {name: rank for rank, name in enumerate(sorted(names))}
    by_class = np.array([ranks[name] for name in names])[index.labels]
    order = np.lexsort((index.names, by_class))  # stable: equal names stay in the shards' order
    labels = np.array([label_of.get(name, -1) for name in names], np.int64)[index.labels]
    return ShardFolder(
        root=root,
        classes=classes,
        paths=index.names[order],
        labels=labels[order],
        ignored=index.ignored,
        notes=() if named else (f"no {CLASSES}: classes go by their numbers",),
        shards=tuple(index.shards),
        members=index.members[order],
    )


def _class_names(root: str) -> list[str] | None:
    for folder in (root, root.rpartition("/")[0] or "."):
        data = read_whole(f"{folder}/{CLASSES}")
        if data is None:
            continue
        names = os.fsdecode(data).replace("\r\n", "\n").removesuffix("\n").split("\n")
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice or "" in names:
            fault = f"{count_names(twice)} twice" if twice else "an empty line"
            raise UserError(
                f"{printable(folder)}/{CLASSES}: {fault}; a line is the name of a class, the first "
                "that of number 0"
            )
        return names
    return None


def open_images(root: str, classes: Sequence[str] | None = None) -> ImageFolder:
    """Opens the images below one folder: class folders or tar shards; see the `scan` of each."""
    return scan(root, classes) if in_shards(root) else image_folder.scan(root, classes)


def open_split(
    data: str, classes: Sequence[str] | None = None, with_train: bool = True, val_split: float = 0.0
) -> tuple[ImageFolder | None, ImageFolder]:
    """Opens the images of data/train and data/val, labelled by the same class names.

    Args:
        classes: the names in label order; by default those of data/train.
        with_train: False looks at data/val alone.
        val_split: data has neither, and this share of each class is for val; see
            `image_folder.split`.
    """
    if not is_remote(str(data)) and not os.path.isdir(data):
        image_folder.list_classes(data)  # says so, with the nearest name
    if val_split:
        if there := [name for name in ("train", "val") if os.path.isdir(os.path.join(data, name))]:
            raise UserError(
                f"{printable(data)}: has {there[0]}/, and --val-split {val_split:g} is for class "
                "folders alone: give --val-split 0, or the folder that holds them"
            )
        return image_folder.split(open_images(data, classes), val_split)
    train = open_images(os.path.join(data, "train"), classes) if with_train else None
    return train, open_images(os.path.join(data, "val"), train.classes if train else classes)


def find_index(root: str) -> ShardIndex | None:
    """Returns the index of a folder's shards, made if there is none; None where there are no
    shards.

    It is stored beside the shards. In a store it has to be there: to make it, every byte of the
    shards would have to come. There each image is compared with its header when it is read.

    Raises:
        UserError: a shard that is damaged, or no webdataset; an index that is damaged, or of other
            shards.
    """
    _opened.cache_clear()  # an open file would still show contents that have been replaced since
    listed, path, remote = list_shards(root), f"{root}/{NAME}", is_remote(root)
    if (data := read_whole(path)) is not None:
        try:
            index = ShardIndex.from_bytes(data)
        except ValueError as error:
            again = "make it where the shards lie, and upload it" if remote else "remove it"
            raise UserError(f"{printable(path)}: {error}; {again}, and start again") from None
        if not remote and (other := sorted(index.shards.items() ^ listed.items())):
            raise UserError(
                f"{printable(path)}: {printable(other[0][0])} is missing, new, or of another size "
                "than when the index was made; copy that shard again, or remove the index, and "
                "start again"
            )
        return index
    if not listed:
        return None
    index = make_index(root, listed)
    with contextlib.suppress(UserError):  # where it cannot be written, the next run makes it again
        write_atomically(Path(path), index.to_bytes())
    return index


def make_index(root: str, listed: Mapping[str, int]) -> ShardIndex:
    """Reads the headers of all shards, whose names and sizes are `listed`.

    Raises:
        UserError: see `find_index`.
    """
    images: list[tuple[bytes, int, tuple[int, ...]]] = []  # name, label, a row of MEMBER
    ignored: Counter[str] = Counter()
    for number, shard in enumerate(tqdm(listed, desc="indexing", unit="shard", disable=None)):
        path = f"{root}/{shard}"
        try:
            with open(path, "rb") as file:
                for entry, label in _images(file, path, ignored):
                    position = (number, entry.offset, entry.size, entry.header)
                    images.append((os.fsencode(entry.name), label, position))
        except OSError as error:
            raise UserError(f"{printable(path)}: {error.strerror or error}") from None
    if not images:
        raise UserError(
            f"{printable(root)}: no image with its class number beside it (KEY.jpg and KEY.cls) in "
            f"{len(listed)} tar files; python -m tools.make_shards writes such shards"
        )
    names, labels, members = zip(*images, strict=True)
    return ShardIndex(
        dict(listed),
        np.array(names),
        np.array(labels, np.int64),
        np.array([*members], MEMBER),
        dict(ignored),
    )


class Entry(NamedTuple):
    """Holds a file of a shard: its key and ending as webdataset splits names, and where it lies."""

    key: str
    ending: str  # in lower case
    name: str
    label: int  # class number in a .cls
    offset: int
    size: int
    header: int  # CRC-32


def _images(file: BinaryIO, path: str, ignored: Counter[str]) -> Iterator[tuple[Entry, int]]:
    """Yields each image of a shard and its class number.

    Neighbours of one key belong together, as the webdataset package groups them: a key may come
    again elsewhere, as where each class counts anew.
    """
    for key, neighbours in groupby(_files(file, path, ignored), lambda entry: entry.key):
        sample: dict[str, Entry] = {}
        for entry in neighbours:
            if sample.setdefault(entry.ending, entry) is not entry:
                raise UserError(
                    f"{printable(path)}: {printable(key)} has two .{printable(entry.ending)} "
                    "behind one another; give each image a key of its own"
                )
        labelled: dict[str, str] = {}
        for ending, entry in sample.items():
            stem, dot, kind = ending.rpartition(".")
            label = sample.get(f"{stem}{dot}cls")
            if kind == "cls":
                continue
            if f".{kind}" not in EXTENSIONS:
                ignored[f".{kind}" if kind else "no ending"] += 1
            elif label is None:
                ignored["image without .cls"] += 1
            elif (other := labelled.setdefault(stem, entry.name)) is not entry.name:
                raise UserError(
                    f"{printable(path)}: {printable(other)} and {printable(entry.name)} have one "
                    "key, and one .cls for both; leave one image to a key"
                )
            else:
                yield entry, label.label


def _files(file: BinaryIO, path: str, ignored: Counter[str]) -> Iterator[Entry]:
    """Yields the files of a shard that are neither links nor hidden and have an ending."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (`file` is the caller's)
        for member in tar:
            name = member.name.removeprefix("./")
            parts = KEY.fullmatch(name)
            if member.issparse() or not member.isfile():  # a sparse file lies there in pieces
                if name.lower().endswith(EXTENSIONS):
                    ignored["link or sparse"] += 1
            elif os.path.basename(name).startswith("."):
                ignored["hidden"] += 1
            elif parts is None:
                ignored["no ending"] += 1
            else:
                file.seek(member.offset_data - BLOCK)
                header, ending, label = zlib.crc32(file.read(BLOCK)), parts[2].lower(), -1
                if ending.rpartition(".")[2] == "cls":
                    label = _class_number(file.read(min(member.size, BLOCK)), f"{path}:{name}")
                begin, size = member.offset_data, member.size
                yield Entry(parts[1], ending, name, label, begin, size, header)
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end, too
            raise tarfile.ReadError(f"no end mark behind {len(tar.getmembers())} files")
    # tarfile lets the others pass where a sparse file's header holds no numbers.
    except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"{printable(path)}: damaged or cut short ({error}); copy or make it again"
        ) from None


def _class_number(text: bytes, name: str) -> int:
    digits = text.strip() if len(text) < BLOCK else b""  # more than was read
    if not (digits.isdigit() and len(digits) < 20 and int(digits) < MOST_CLASSES):
        raise UserError(
            f"{printable(name)}: holds {text[:20]!r}, not the number of a class (0 to "
            f"{MOST_CLASSES - 1:,}); python -m tools.make_shards writes such numbers"
        )
    return int(digits)


def is_remote(path: str) -> bool:
    """Returns whether `path` is a URL."""
    return "://" in path


def list_shards(folder: str) -> dict[str, int]:
    """Returns the tar files of a local folder, sorted, with their sizes in bytes."""
    try:
        with os.scandir(folder) as entries:
            files = {e.name: e.stat().st_size for e in entries if e.is_file()}
    except OSError:
        return {}
    names = sorted(n for n in files if n.lower().endswith(".tar") and not n.startswith("."))
    return {name: files[name] for name in names}


def read_whole(path: str) -> bytes | None:
    """Returns the contents of a small file; None where there is none."""
    try:
        return _cat(path) if is_remote(path) else Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror}; check its permissions") from None


def read_range(path: str, start: int, size: int) -> bytes:
    """Returns `size` bytes from `start` on; fewer where the file ends."""
    if is_remote(path):
        return _cat(path, start, start + size)
    return os.pread(_opened(path).fileno(), size, start)  # which moves no shared file position


@functools.lru_cache(OPEN_FILES)
def _opened(path: str) -> BinaryIO:
    # Opening costs a network file system a round trip; one less for each image is what large files
    # are for. The one that is dropped from the cache is closed with its last reference.
    return open(path, "rb", buffering=0)


def _cat(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Returns a file of a store, or bytes of it; how often a store is tried is its package's."""
    import fsspec  # here: it is of no use to local runs

    try:
        store, path = fsspec.core.url_to_fs(url)  # each process has its own
        return bytes(store.cat_file(path, start=start, end=end))
    except FileNotFoundError:
        raise FileNotFoundError(2, "no such file") from None
    except Exception as error:  # every store has errors of its own
        reason = f"{type(error).__name__} {error}".splitlines()[0].rstrip()
        raise UserError(
            f"{url}: {reason}; check the address, the rights, the network and the store's package, "
            "and go on with --resume auto",
            EXIT_FAILED,
        ) from None

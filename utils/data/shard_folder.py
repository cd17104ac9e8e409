"""Reads a folder of tar shards as an ImageFolder: same classes, same labels, same order of images.

The order is by class name and then by name, as in class folders, whatever shards the images lie in:
a run on shards is bit for bit the run on the folder that they were made from.
"""

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.data import remote_files
from utils.data.image_folder import ImageFolder, count_names
from utils.data.shard_index import BLOCK, NAME, find_index
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import printable

CLASSES = "classes.txt"


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
                or a store does not answer. No fault of the image's: it is not to be replaced by
                another.
        """
        try:
            data = remote_files.read_range(self.shard, self.offset - BLOCK, BLOCK + self.size)
        except OSError as error:
            raise UserError(
                f"{printable(self.shard)}: {error.strerror or error}; see to it, and go on with "
                "--resume auto",
                EXIT_FAILED,
            ) from None
        if zlib.crc32(data[:BLOCK]) != self.header or len(data) != BLOCK + self.size:
            index = f"{os.path.dirname(self.shard)}/{NAME}"
            raise UserError(
                f"{printable(str(self))}: the shard has changed since its index was made; put it "
                f"back, or remove {printable(index)} and start again",
                EXIT_FAILED,
            )
        return data[BLOCK:]


@dataclass(frozen=True, kw_only=True)
class ShardFolder(ImageFolder):
    """Holds the images of the shards in one folder. `paths` are their names inside the shards."""

    shards: tuple[str, ...]  # file names
    members: np.ndarray  # (n,) shard_index.MEMBER

    @property
    def where(self) -> str:
        return f"{printable(self.root)}, {len(self.shards)} shard{'s' * (len(self.shards) > 1)}"

    def path(self, index: int) -> Member:
        shard, offset, size, header = self.members[index].item()
        return Member(f"{self.root}/{self.shards[shard]}", self.paths[index], offset, size, header)

    def take(self, indices: np.ndarray) -> "ShardFolder":
        return replace(super().take(indices), members=self.members[indices])


def in_shards(root: str) -> bool:
    """Returns whether the images in `root` are to be read from shards.

    Class folders come first: ImageNet's own archives are often left beside what was unpacked.
    """
    if remote_files.is_remote(root):
        return True
    if not remote_files.sizes(root, ".tar"):
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
            f"{printable(root)}: no tar shards there, and no {NAME}; object storage is read as "
            "shards, which python -m tools.make_shards writes"
        )
    names = _class_names(root)
    highest = int(index.labels.max())
    named = names is not None
    if not named:
        names = [str(number) for number in range(highest + 1)]
    elif highest >= len(names):
        raise UserError(
            f"{printable(root)}: an image has the class number {highest} (they count from 0), and "
            f"{CLASSES} has {len(names)} names; give it a line for every class"
        )
    wanted = list(names if classes is None else classes)
    label_of = {name: label for label, name in enumerate(wanted)}
    present = [names[number] for number in np.unique(index.labels).tolist()]
    if unknown := [name for name in present if name not in label_of]:
        remedy = "" if named else f"; write the names of the numbers into a {CLASSES} beside it"
        raise UserError(
            f"{printable(root)}: {count_names(unknown)} not among the {len(wanted)} known classes"
            f"{remedy or '; labels go by name'}"
        )
    ranks = {name: rank for rank, name in enumerate(sorted(names))}
    by_class = np.array([ranks[name] for name in names])[index.labels]
    order = np.lexsort((index.names, by_class))  # stable: equal names stay in the shards' order
    labels = np.array([label_of.get(name, -1) for name in names], np.int64)[index.labels]
    return ShardFolder(
        root=root,
        classes=tuple(wanted),
        paths=index.names[order],
        labels=labels[order],
        ignored=index.ignored,
        notes=() if named else (f"no {CLASSES}: classes go by their numbers",),
        shards=index.shards,
        members=index.members[order],
    )


def _class_names(root: str) -> list[str] | None:
    for folder in (root, root.rpartition("/")[0] or "."):
        data = remote_files.read_whole(f"{folder}/{CLASSES}")
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

"""Writes class folders as tar shards in webdataset's format: few large files for many small ones.

    python -m tools.make_shards SRC DST                 DST/train/*.tar, DST/val/*.tar, classes.txt
    python -m tools.make_shards SRC DST --shard-mb 1000

SRC holds train/ and val/ of class folders; the images go into the shards as they are. main.py takes
DST as it takes SRC, and a run on it is the same run. A shard that is there already is not written
again, so the same command goes on where an interrupted one stopped.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.command_line.parser import Parser
from utils.config.flags import positive_int
from utils.data import image_folder, shards
from utils.data.decoding import read_file
from utils.data.image_folder import ImageFolder
from utils.data.shards import ShardFolder
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script
from utils.system.files import remove_leftovers, write_atomically
from utils.system.processes import default_workers, shared
from utils.system.text import counted, printable

SHUFFLE = 0  # seed


def plan_shards(sizes: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Returns the images of each shard, at most `most` bytes unless one image is larger.

    They are shuffled, always in the same way. It makes no difference to a run here, but readers
    that stream shards mix only neighbours.
    """
    order = np.random.default_rng(SHUFFLE).permutation(len(sizes))
    begin, filled = 0, 0
    for at, size in enumerate(sizes[order].tolist()):
        if at > begin and filled + size > most:
            yield order[begin:at]
            begin, filled = at, 0
        filled += size
    yield order[begin:]


def write_shard(images: ImageFolder, target: Path) -> None:
    """Writes one shard, unless it is there: each image, and its class number in KEY.cls."""
    if os.path.lexists(target):
        return
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for index in range(len(images)):
            name = os.fsdecode(images.paths[index])
            data = _try(read_file, images.path(index))
            key, _ = os.path.splitext(name)
            for member, content in ((name, data), (f"{key}.cls", b"%d" % images.labels[index])):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    write_atomically(target, buffer.getbuffer())


def write_split(images: ImageFolder, folder: Path, most: int, processes: int) -> ShardFolder:
    """Writes all shards of one side and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    sizes = np.array([_try(os.stat, images.path(i)).st_size for i in range(len(images))], np.int64)
    plan = list(plan_shards(sizes, most))
    targets = [folder / f"{folder.name}-{number:05}.tar" for number in range(len(plan))]
    done = shared(write_shard, map(images.take, plan), targets, processes=processes)
    for _ in tqdm(done, desc=folder.name, total=len(plan), unit="shard", disable=None):
        pass

    # What an earlier command left there may have been made from other images.
    written = shards.scan(str(folder), images.classes)
    if not (
        np.array_equal(written.paths, images.paths)
        and np.array_equal(written.labels, images.labels)
        and np.array_equal(written.members["size"], sizes)
    ):
        raise UserError(
            f"{folder}: holds shards of other images, or of another --shard-mb; give a new DST"
        )
    return written


def refuse_twins(images: ImageFolder) -> None:
    """Refuses images of one folder whose names differ in their ending alone: they have one key."""
    seen: dict[tuple[bytes, ...], bytes] = {}
    for path in images.paths.tolist():
        folder, name = os.path.split(os.path.splitext(path)[0])
        first, _, rest = name.partition(b".")  # webdataset compares what follows without its case
        other = seen.setdefault((folder, first, rest.lower()), path)
        if other is not path:
            raise UserError(
                f"{images.where}: {printable(other)} and {printable(path)} would have one key in "
                "a shard, and one .cls: rename one of them"
            )


def main() -> int:
    parser = Parser(prog="python -m tools.make_shards", description=__doc__)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    # fmt: off
    parser.add_argument("--shard-mb", type=positive_int, default=256, metavar="MB",
        help="size of a shard (256)")
    parser.add_argument("-j", "--processes", type=positive_int, default=default_workers(),
        metavar="N", help="that write at a time, each with a shard in memory (default: up to 4)")
    # fmt: on
    args = parser.parse_args()
    source, target = os.path.realpath(args.source), os.path.realpath(args.target)
    if os.path.commonpath([source, target]) == source:
        raise UserError(f"{args.target}: lies in SRC; give a DST outside it")
    train = image_folder.scan(os.path.join(args.source, "train"))
    val = image_folder.scan(os.path.join(args.source, "val"), train.classes)
    if odd := [name for name in train.classes if "\n" in name or "\r" in name]:
        raise UserError(f"{args.source}: {image_folder.count_names(odd)} with a line break; rename")
    names = os.fsencode("".join(f"{name}\n" for name in train.classes))
    for part, images in (("train", train), ("val", val)):
        refuse_twins(images)
        folder = Path(args.target, part)
        if folder.is_dir() and (inside := sorted(e.name for e in folder.iterdir() if e.is_dir())):
            raise UserError(f"{folder}: holds {printable(inside[0])}; give a new DST")
    listed = Path(args.target, shards.CLASSES)
    if not os.path.lexists(listed):
        listed.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(listed, names)
    elif not listed.is_file() or listed.read_bytes() != names:
        raise UserError(f"{listed}: holds other classes than SRC; give a new DST")
    for part, images in (("train", train), ("val", val)):
        most = args.shard_mb * 1_000_000
        written = write_split(images, Path(args.target, part), most, args.processes)
        print(f"{part}: {counted(len(images), 'image', ',')} ({written.where})")
        # webdataset's own reader takes the first dot of a name for the beginning of its ending
        if dots := sum(os.path.basename(path).count(b".") > 1 for path in images.paths):
            print(f"  ! {dots:,} names with a second dot, which the webdataset package cuts there")
    return 0


def _try(read: Callable[[bytes], Any], path: bytes) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"{printable(path)}: {reason}; mend or remove the file"
        raise UserError(text, EXIT_FAILED) from None


if __name__ == "__main__":
    run_script(main)

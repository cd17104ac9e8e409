"""Reads every image below a folder, or in its tar shards, and lists the broken ones.

    python -m tools.check_images DATA                 a CSV of broken files on stdout
    python -m tools.check_images DATA --output BAD.csv
    python -m tools.check_images DATA --split val    one part alone

In a folder in COCO's layout (train2017/, val2017/, annotations/) it also lists every image whose
size is not the one in the annotations, every image that is missing, and every entry that is wrong:
ids and file names that stand twice or lead nowhere, boxes and masks that cannot be used.

Ends with 0 when all can be read, with 1 when some cannot.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from utils.command_line.parser import Parser
from utils.config.flags import positive_int
from utils.data import shards
from utils.data.coco import CocoPaths, check_file, shown
from utils.data.decoding import (
    DECODERS,
    EXTENSIONS,
    BrokenImageError,
    decoder_name,
    orientation,
    read_image,
)
from utils.data.image_folder import files_below
from utils.data.shards import Member
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script
from utils.system.files import check_new_file, write_atomically
from utils.system.processes import processors, shared
from utils.system.text import cell, counted, csv_text, printable

PARTS = ("train", "val")
CHUNK = 16  # files that a process takes at a time


def find_images(root: str) -> tuple[list[bytes | Member], dict[str, int]]:
    """Returns all files with an image's ending below `root`, sorted, and how many others there are.

    See `files_below`. Images in tar shards come first, where `root`, or its train/ or val/, holds
    such shards as main.py would read.
    """
    parts = [os.path.join(root, part) for part in PARTS]
    sharded = [folder for folder in (root, *parts) if shards.in_shards(folder)]
    if shards.is_remote(root):
        sharded = [root] if root.rsplit("/", 1)[-1] in PARTS else parts
    members: list[Member] = []
    others: Counter[str] = Counter()
    for images in map(shards.scan, sharded):
        members += map(images.path, range(len(images)))
        others.update(images.ignored)
    if shards.is_remote(root):
        return members, others
    if not os.path.isdir(root):
        raise UserError(f"{printable(root)}: no such folder; give the folder that holds the images")

    paths, of_shards = [], {folder.rstrip("/") or "/" for folder in sharded}
    for path, ending in files_below(root):
        if os.fsdecode(os.path.dirname(path)) in of_shards:
            continue
        if ending in EXTENSIONS:
            paths.append(path)
        else:
            others[ending or "no ending"] += 1
    return members + sorted(paths), others


def part_of(root: str, part: str) -> str:
    """Returns the folder, or the address, of one part of the data: DATA/val, or DATA/val2017."""
    if shards.is_remote(root):
        return f"{root.rstrip('/')}/{part}"
    for name in (part, f"{part}2017"):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    raise UserError(
        f"{printable(root)}: no folder {part} or {part}2017 in it; leave out --split {part}, or "
        "give the folder that holds it"
    )


def check_annotations(
    root: str, parts: Iterable[str] = PARTS
) -> tuple[dict[bytes, tuple[int, int]], list[BrokenImageError]]:
    """Looks through COCO's annotations in `root`, if there are any.

    Returns:
        Height and width of each image by its path, and all that is wrong: images that are missing,
        and images' entries, categories and objects.
    """
    sizes, faults = {}, []
    for part in parts:
        images = Path(root, f"{part}2017")
        annotations = Path(root, "annotations", f"instances_{part}2017.json")
        if not annotations.is_file() or not images.is_dir():
            continue
        # Where an image lies is no fault here: the user has named the folder to look at.
        sizes_of_part, faults_of_part = check_file(CocoPaths(part, images, annotations, True))
        for file_name, size in sizes_of_part.items():
            name = os.path.normpath(file_name.encode("utf-8", "surrogatepass"))
            path = os.path.join(os.fsencode(images), name)
            sizes[path] = size
            if not os.path.isfile(path):
                missing = "missing, but in the annotations"
                faults.append(BrokenImageError(shown(os.fsdecode(path)), missing))
        faults += [BrokenImageError(path, reason) for path, reason in faults_of_part]
    return sizes, faults


def find_broken(
    paths: list[bytes | Member],
    decoder: str,
    processes: int,
    sizes: Mapping[bytes, tuple[int, int]] | None = None,
) -> Iterator[BrokenImageError | None]:
    """Yields for each of `paths`, in order, why it cannot be read, or None.

    Args:
        sizes: path → height and width that its image must have.
    """
    items = [(path, (sizes or {}).get(path)) for path in paths]
    return shared(partial(_read, decoder=decoder), items, processes=processes, chunk=CHUNK)


# fmt: off
def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.check_images", description=__doc__)
    add = parser.add_argument
    add("data", metavar="DATA", help="a folder; every image below it is read")
    add("--split", choices=PARTS,
        help="read this part alone: DATA/val, or DATA/val2017 with its annotations")
    add("--output", metavar="FILE", help="write the CSV here (a new file)")
    add("-j", "--processes", type=positive_int, default=processors(), metavar="N",
        help="that read at a time (default: one a core)")
    add("--decoder", type=decoder_name, metavar="NAME", default=DECODERS[0],
        help=f"{', '.join(DECODERS)}: as training will read")
    return parser
# fmt: on


def main() -> int:
    args = build_parser().parse_args()
    check_new_file(args.output)
    root = args.data if args.split is None else part_of(args.data, args.split)
    paths, others = find_images(root)
    parts = PARTS if args.split is None else (args.split,)
    sizes, faults = check_annotations(args.data, parts)
    results = find_broken(paths, args.decoder, args.processes, sizes)
    bar = tqdm(results, total=len(paths), unit="image", disable=not sys.stderr.isatty())
    broken = [error for error in bar if error is not None] + faults

    passed = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
    line = f"{counted(len(paths), 'image', ',')} read, {len(broken):,} broken"
    print(f"{line}; passed over: {passed}" if passed else line, file=sys.stderr)
    rows = [["path", "reason"], *([cell(error.path), cell(error.reason)] for error in broken)]
    if args.output:
        write_atomically(Path(args.output), csv_text(rows).encode())
    else:
        print(csv_text(rows), end="")
    return EXIT_FAILED if broken else 0


def _read(
    item: tuple[bytes | Member, tuple[int, int] | None], decoder: str
) -> BrokenImageError | None:
    path, size = item
    try:
        image = read_image(path, decoder)
        width, height = image.size if isinstance(image, Image.Image) else image.shape[:-3:-1]
        if size is not None and size != (height, width):
            reason = f"{width}x{height} pixels, but {size[1]}x{size[0]} in the annotations"
            with Image.open(os.fsdecode(path)) as stored:
                turned = orientation(stored) >= 5
            if size == (width, height) and turned:
                reason += ": its EXIF orientation turns it, which the annotations leave out"
            return BrokenImageError(printable(path), reason)
    except BrokenImageError as error:
        return error
    except UserError as error:  # of a file: its part of the disk cannot be read, others' can
        if isinstance(path, Member):
            raise
        name = printable(path)
        return BrokenImageError(name, str(error).removeprefix(f"{name}: "))
    return None


if __name__ == "__main__":
    run_script(main)

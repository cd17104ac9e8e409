"""Writes a copy of an image folder with the shorter side reduced, for quicker training.

    python -m tools.resize_images SRC DST --size 256

Folder and file names stay, and linked folders are copied like others. What is reduced becomes a
JPEG, also where the name ends otherwise, and what is small enough is copied byte for byte. What is
there already is not written again, so the same command goes on where an interrupted one stopped.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from utils.data.decoding import EXTENSIONS, BrokenImageError, read_file, read_image
from utils.data.image_folder import find_images
from utils.options.parser import Parser, number, positive_int, run_script
from utils.system.cpu_share import processors
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import remove_leftovers, write_atomically
from utils.system.processes import shared
from utils.system.text import printable

RECORD = "resized.json"  # in DST: how its images were made
CHUNK = 16  # images that a process takes at a time


def resize_one(
    relative: bytes, source: bytes, target: bytes, size: int, quality: int
) -> str | None:
    """Writes one reduced image, unless it is there; returns what was wrong with it, if anything.

    An image whose shorter side is `size` or less is copied as it is: encoding it once more would
    cost quality for nothing.

    Raises:
        UserError: no room, or another fault of the place.
    """
    place = Path(os.fsdecode(os.path.join(target, relative)))
    if place.exists():
        return None
    path = os.path.join(source, relative)
    try:
        image = read_image(path, "pil")
    except BrokenImageError as error:
        return str(error)
    scale = size / min(image.size)
    if scale < 1:
        shape = tuple(max(size, round(side * scale)) for side in image.size)
        image = image.resize(shape, Image.Resampling.BILINEAR, reducing_gap=3.0)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=quality, subsampling=0)
        data = encoded.getvalue()
    else:
        data = read_file(path)
    with _naming(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, data)
    return None


def open_target(target: Path, images: Iterable[bytes], settings: Mapping[str, int]) -> None:
    """Makes the folder, or sees that what it holds was written with the same settings.

    What a killed process left half written there goes.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    record = target / RECORD
    with _naming(target):
        target.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            held = [name for name in os.listdir(target) if not name.startswith(f".{RECORD}.tmp-")]
            if held:
                raise UserError(f"{target}: holds {printable(min(held))} already; give a new DST")
            write_atomically(record, json.dumps(settings).encode())
            return
        try:
            before = json.loads(record.read_text())
            flags = " ".join(f"--{name} {value}" for name, value in before.items())
        except (ValueError, AttributeError):
            raise UserError(f"{record}: is not of this program; give a new DST") from None
        if before != settings:
            raise UserError(f"{target}: was made with {flags}; give the same, or a new DST")
        for folder in {os.path.dirname(image) for image in images}:
            remove_leftovers(target / os.fsdecode(folder))


def main() -> int:
    parser = Parser(prog="python -m tools.resize_images", description=__doc__)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    parser.add_argument(
        "--size", type=positive_int, default=256, metavar="S", help="pixels, shorter side (256)"
    )
    parser.add_argument(
        "--quality", type=number(int, 1, 100), default=92, metavar="Q", help="of JPEGs (92)"
    )
    parser.add_argument(
        "-j",
        "--workers",
        type=positive_int,
        default=processors(),
        metavar="N",
        help="processes (default: one a core)",
    )
    args = parser.parse_args()
    source, target = os.path.realpath(args.source), os.path.realpath(args.target)
    if not os.path.isdir(source):
        raise UserError(f"{printable(args.source)}: no such folder; SRC is the folder to copy")
    if os.path.commonpath([source, target]) == source:
        raise UserError(f"{printable(args.target)}: lies in SRC; give a DST outside it")
    images = find_images(source)
    if not images:
        raise UserError(f"{printable(args.source)}: holds no images ({' '.join(EXTENSIONS)})")
    settings = {"size": args.size, "quality": args.quality}
    open_target(Path(target), images, settings)
    work = partial(resize_one, source=os.fsencode(source), target=os.fsencode(target), **settings)
    results = shared(work, images, processes=args.workers, chunk=CHUNK)
    bar = tqdm(results, total=len(images), unit="image", disable=None)
    faults = [fault for fault in bar if fault is not None]
    print(f"{len(images) - len(faults):,} images in {printable(args.target)}")
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    return EXIT_FAILED if faults else 0


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; give another DST, or mend its rights", EXIT_FAILED
        ) from None


if __name__ == "__main__":
    run_script(main)

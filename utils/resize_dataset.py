"""Writes a copy of an image folder with the shorter side reduced, for quicker training.

    python -m utils.resize_dataset SRC DST --size 256

Folder and file names stay; what is reduced becomes a JPEG, also where the name ends otherwise, and
what is small enough is copied byte for byte. What is there already is not written again, so the
same command goes on where an interrupted one stopped.
"""

import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from utils.cli import Parser, positive_int, run_script
from utils.errors import EXIT_FAILED, UserError
from utils.files import write_atomically
from utils.image_io import EXTENSIONS, BrokenImageError, printable, read_file, read_image
from utils.processes import processors


def resize_one(
    relative: bytes, source: bytes, target: bytes, size: int, quality: int
) -> str | None:
    """Writes one reduced image, unless it is there; returns what was wrong with it, if anything.

    An image whose shorter side is `size` or less is copied as it is: encoding it once more would
    cost quality for nothing.
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
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, data)
    return None


def find_images(root: bytes) -> list[bytes]:
    """Relative paths of all images below `root`, hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(b".")]
        for name in names:
            if not name.startswith(b".") and os.fsdecode(name).lower().endswith(EXTENSIONS):
                found.append(os.path.relpath(os.path.join(folder, name), root))
    return sorted(found)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    parser.add_argument("--size", type=positive_int, default=256, help="shorter side (256)")
    parser.add_argument("--quality", type=positive_int, default=92, help="JPEG (92)")
    parser.add_argument("-j", "--workers", type=positive_int, default=processors())
    args = parser.parse_args()
    source, target = os.path.realpath(args.source), os.path.realpath(args.target)
    if not os.path.isdir(source):
        raise UserError(f"{args.source}: no such folder; SRC is the folder to copy")
    if os.path.commonpath([source, target]) == source:
        raise UserError(f"{args.target}: lies in SRC; give a DST outside it")
    images = find_images(os.fsencode(source))
    if not images:
        raise UserError(f"{args.source}: holds no images ({' '.join(EXTENSIONS)})")
    work = partial(
        resize_one, source=os.fsencode(source), target=os.fsencode(target), size=args.size,
        quality=args.quality,
    )  # fmt: skip
    with ProcessPoolExecutor(args.workers) as pool:
        results = pool.map(work, images, chunksize=16)
        faults = [f for f in tqdm(results, total=len(images), unit="image") if f is not None]
    print(f"{len(images) - len(faults):,} images in {printable(args.target)}")
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    return EXIT_FAILED if faults else 0


if __name__ == "__main__":
    run_script(main)

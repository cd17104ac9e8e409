"""The data sets that `demo:NAME` stands for: each is written once as an ImageFolder tree.

demo:digits comes with scikit-learn. The small photographs of demo:fashion, demo:cifar10 and
demo:cifar100 are made of the data sets' original files, which torchvision reads and, with
--download, fetches. Nothing of a file is believed before its checksum agrees: CIFAR's files are
pickles, which could run code when they are opened.
"""

import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.system.distributed import Context, share
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import did_you_mean, printable

HOME = Path(__file__).resolve().parents[2] / "demo_data"
PREFIX = "demo:"
PHOTO_SETS = {"fashion": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
DEMOS = ", ".join(PREFIX + name for name in ("digits", *PHOTO_SETS))  # for messages

SPLIT_SEED = 0
VAL_SHARE = 0.2
DIGIT_PIXELS = 32  # the 8 x 8 scans, enlarged once, so that every run reads the same files

# Digits are small, never mirrored and fill their frame: what differs from photographs. It holds for
# every --recipe: TrivialAugment would turn a 6 into a 9 and shift it out of its 32 pixels, and a
# demo of 8 epochs must see each image in each of them. Mixing, smoothing and averaging remain.
DIGITS_RECIPE = {
    "epochs": 8,
    "batch_size": 32,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "img_size": 32,
    "crop_pct": 1.0,
    "min_scale": 0.7,
    "hflip": 0.0,
    "auto_augment": "none",
    "repeats": 1,
    "train_size": 0,
}

# MobileNetV2 halves a map 5 times, and takes longer than a ResNet to settle.
LIGHT_DIGITS = {"img_size": 64, "epochs": 10, "lr": 0.03}

FASHION_CLASSES = (  # in label order, as the folders are named
    *("t-shirt_top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)

# The photographs have 28 or 32 pixels a side and are enlarged to 64: of 32 pixels the last stage of
# a network would keep one position, and there would be nothing to pool. They fill their frame, so
# crops stay large. It holds for every --recipe, as with the digits.
PHOTOS = {"epochs": 5, "batch_size": 128, "img_size": 64, "hflip": 0.5}
PHOTOS_RECIPE = {**DIGITS_RECIPE, **PHOTOS}

FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # of Debian and Ubuntu
FASHION_SHA256 = {  # unpacked: packages compress the same files anew
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_BYTES = 16 + 60_000 * 28 * 28  # of the largest of them


def write_digits(folder: Path) -> None:
    """Writes the 1,797 digits to folder/{train,val}/{0..9}/NNNN.png.

    One in five of each class goes to val, the same ones every time.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install -r requirements-dev.txt"
        ) from None
    digits = load_digits()
    chance = np.random.default_rng(SPLIT_SEED)
    for label in range(10):
        members = chance.permutation(np.flatnonzero(digits.target == label))
        first_train = round(len(members) * VAL_SHARE)
        for part, indices in (("val", members[:first_train]), ("train", members[first_train:])):
            of_class = folder / part / str(label)
            of_class.mkdir(parents=True)
            for index in indices:
                pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
                size = (DIGIT_PIXELS, DIGIT_PIXELS)
                image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                image.save(of_class / f"{index:04d}.png")


def write_photos(folder: Path, name: str, files: Path | None, download: bool) -> None:
    """Writes folder/{train,val}/CLASS/NNNNN.png, numbered as in the original files.

    They are Fashion-MNIST's 70,000 garments, 28 × 28 grey pixels, or the 60,000 images of CIFAR-10
    or CIFAR-100 (by its 100 fine classes), 32 × 32 pixels in colour.

    Args:
        name: of torchvision's reader, one of `PHOTO_SETS`.
        files: folder of the original files; None for where a package of the system puts them.

    Raises:
        UserError: files are missing or are not those that were published; or the download failed.
    """
    from torchvision import datasets  # slow to import

    reader = getattr(datasets, name)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if download:
            try:
                reader(root, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"--download: {printable(str(error))}; fetch the files elsewhere, and give "
                    "their folder with --data-files",
                    EXIT_FAILED,
                ) from None
        elif name == "FashionMNIST":
            _unpack_fashion(files or FASHION_PACKAGE, root / name / "raw")
        else:
            root = _cifar_root(reader, files, root)
        try:  # of CIFAR each file's MD5 is compared before the first pickle is opened
            parts = {"train": reader(root), "val": reader(root, train=False)}
        except (OSError, RuntimeError):
            raise _bad(root / reader.base_folder, "a file is missing or has another MD5") from None
    classes = FASHION_CLASSES if name == "FashionMNIST" else parts["train"].classes
    for part, images in parts.items():
        folders = [folder / part / of_class for of_class in classes]
        for of_class in folders:
            of_class.mkdir(parents=True)
        pairs = zip(np.asarray(images.data), np.asarray(images.targets), strict=True)
        bar = tqdm(pairs, part, len(images), disable=not sys.stderr.isatty(), unit="image")
        for i, (pixels, label) in enumerate(bar):
            Image.fromarray(pixels).save(folders[label] / f"{i:05d}.png")


def _cifar_root(reader: Any, folder: Path | None, temporary: Path) -> Path:
    """Returns where torchvision's reader finds CIFAR's Python version: unpacked where needed."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    if folder is not None and (folder / reader.base_folder).is_dir():
        return folder
    archive = (folder or temporary) / reader.filename
    if not archive.is_file():
        raise _missing(reader.__name__.lower(), reader.filename, folder)
    if not check_integrity(archive, reader.tgz_md5):
        raise _bad(archive, "its MD5 is another than the published")
    extract_archive(archive, temporary)
    return temporary


def _unpack_fashion(source: Path, raw: Path) -> None:
    """Writes Fashion-MNIST's files, or what is in their .gz, to `raw`, for torchvision."""
    raw.mkdir(parents=True)
    if (source / "FashionMNIST" / "raw").is_dir():
        source = source / "FashionMNIST" / "raw"
    for name, digest in FASHION_SHA256.items():
        file = source / name if (source / name).is_file() else source / f"{name}.gz"
        if not file.is_file():
            package = "; on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
            raise _missing("fashion", file.name, source, package)
        try:
            with (gzip.open if file.suffix else open)(file, "rb") as opened:
                data = opened.read(FASHION_BYTES + 1)  # not all of a zip bomb
        except (OSError, EOFError, zlib.error) as error:
            raise _bad(file, error) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise _bad(file, "its SHA-256 is another than the published")
        (raw / name).write_bytes(data)


def _missing(name: str, file: str, folder: Path | None, more: str = "") -> UserError:
    where = "" if folder is None else f"no {file} in {printable(folder)}; "
    return UserError(
        f"demo:{name} is made of the data set's original files: {where}give their folder "
        f"(main.py demo:{name} --data-files DIR), or let torchvision fetch them (main.py "
        f"demo:{name} --download){more}"
    )


def _bad(file: Path, reason: object) -> UserError:
    return UserError(
        f"{printable(file)}: {printable(str(reason))}; get the original file again (--download)",
        EXIT_FAILED,
    )


def is_demo(data: str | None) -> bool:
    """Whether DATA names a demo rather than a folder."""
    return data is not None and data.startswith(PREFIX)


def takes_files(data: str | None) -> bool:
    """Whether DATA names a demo that is made of original files."""
    return is_demo(data) and str(data).removeprefix(PREFIX) in PHOTO_SETS


def recipes(arch: str, light: bool = False) -> dict[str, dict[str, Any]]:
    """Returns what each demo needs of a script's recipe, as {"demo:NAME": {field: value}}.

    Args:
        light: whether it is a MobileNetV2.
    """
    digits = DIGITS_RECIPE | (LIGHT_DIGITS if light else {})
    photos = dict.fromkeys(PHOTO_SETS, PHOTOS_RECIPE)
    named = {"digits": digits, **photos}
    return {PREFIX + name: {"arch": arch, **recipe} for name, recipe in named.items()}


def find_root(
    data: str, context: Context, files: str | None = None, download: bool = False
) -> str | Path:
    """Returns what `prepare` does; rank 0 writes demo data while the others wait."""
    if not is_demo(data):
        return data
    root: Path = share(prepare(data, files, download) if context.is_main else None, context)
    return root


def prepare(data: str, files: str | None = None, download: bool = False) -> str | Path:
    """Returns the folder that DATA names; that of a demo's images is written the first time.

    Raises:
        UserError: another name; the original files are missing, or are not those that were
            published.
    """
    if not is_demo(data):
        return data
    name = data.removeprefix(PREFIX)
    if name == "digits":
        return write_once(HOME / name, write_digits)
    if name not in PHOTO_SETS:
        hint = did_you_mean(data, DEMOS.split(", ")) or f"; there is {DEMOS}"
        raise UserError(f"no demo data {data!r}{hint}")
    origin = Path(files) if files is not None else None
    write = partial(write_photos, name=PHOTO_SETS[name], files=origin, download=download)
    return write_once(HOME / name, write)


def write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, made by `write` in a folder beside it if it is not there: whole, or not at all.

    What lies below the present folder is returned, and so told, by its short name.

    Raises:
        UserError: the folder cannot be written.
    """
    staging = None
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            write(staging)
            os.chmod(staging, 0o755)
            os.rename(staging, target)
    except OSError as error:
        if not target.is_dir():  # else another process was first, with the same files
            why = error.strerror or error
            raise UserError(
                f"{target}: cannot write there ({why}); make room, or mend its rights", EXIT_FAILED
            ) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    here = Path.cwd()
    return target.relative_to(here) if target.is_relative_to(here) else target

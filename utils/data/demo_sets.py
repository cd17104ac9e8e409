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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.system.distributed import Context, share
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import did_you_mean, printable

HOME = Path(__file__).resolve().parents[2] / "demo_data"
PREFIX = "demo:"

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

FASHION_CLASSES = (  # in label order, as the folders are named
    "t-shirt_top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
)

# The photographs have 28 or 32 pixels a side and are enlarged to 64: of 32 pixels the last stage of
# a network would keep one position, and there would be nothing to pool. They fill their frame, so
# crops stay large. It holds for every --recipe, as with the digits.
PHOTOS_RECIPE = {
    "epochs": 5,
    "batch_size": 128,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "img_size": 64,
    "crop_pct": 1.0,
    "min_scale": 0.7,
    "hflip": 0.5,
    "auto_augment": "none",
    "repeats": 1,
    "train_size": 0,
}

FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # of Debian and Ubuntu
FASHION_SHA256 = {  # unpacked: packages compress the same files anew
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 50_000_000  # bytes, more than any of the four: nothing is unpacked beyond it


@dataclass(frozen=True)
class Origin:
    """Says where a data set's original files are.

    Args:
        folder: that holds them, or None for where a package of the system puts them.
        download: whether torchvision is to fetch them.
    """

    folder: Path | None = None
    download: bool = False


def write_digits(folder: Path, _: Origin | None = None) -> None:
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
            place = folder / part / str(label)
            place.mkdir(parents=True)
            for index in indices:
                pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(pixels).resize(
                    (DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC
                )
                image.save(place / f"{index:04d}.png")


def write_fashion(folder: Path, origin: Origin) -> None:
    """Writes Fashion-MNIST's 70,000 images of garments, 28 × 28 grey pixels.

    Raises:
        UserError: files are missing or are not those that were published; or the download failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary) / "FashionMNIST" / "raw"  # where torchvision has them
        raw.mkdir(parents=True)
        source = origin.folder or FASHION_PACKAGE
        if origin.download:
            source = raw
            _fetch("FashionMNIST", temporary)
        elif (source / "FashionMNIST" / "raw").is_dir():
            source = source / "FashionMNIST" / "raw"
        for name, digest in FASHION_SHA256.items():
            (raw / name).write_bytes(_unpacked(source / name, digest))
        from torchvision.datasets import FashionMNIST  # slow to import

        sides = {"train": FashionMNIST(temporary), "val": FashionMNIST(temporary, train=False)}
    parts = {part: (side.data.numpy(), side.targets.numpy()) for part, side in sides.items()}
    write_parts(folder, FASHION_CLASSES, parts)


def write_cifar(folder: Path, origin: Origin, name: str) -> None:
    """Writes the 60,000 images of CIFAR-10, or those of CIFAR-100 by their 100 fine classes.

    `origin.folder` holds the Python version, as its archive or unpacked.

    Args:
        name: of torchvision's reader, "CIFAR10" or "CIFAR100".

    Raises:
        UserError: files are missing or are not those that were published; or the download failed.
    """
    from torchvision import datasets  # slow to import
    from torchvision.datasets.utils import check_integrity, extract_archive

    reader = getattr(datasets, name)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if origin.download:
            _fetch(name, temporary)
        elif origin.folder is None:
            raise _missing(name.lower(), reader.filename, None)
        elif (origin.folder / reader.base_folder).is_dir():
            root = origin.folder
        elif (archive := origin.folder / reader.filename).is_file():
            if not check_integrity(archive, reader.tgz_md5):
                raise _bad(archive, "its MD5 is another than the published")
            extract_archive(archive, temporary)
        else:
            raise _missing(name.lower(), reader.filename, origin.folder)
        try:  # each file's MD5 is compared before the first pickle is opened
            sides = {"train": reader(root), "val": reader(root, train=False)}
        except (OSError, RuntimeError):
            raise _bad(root / reader.base_folder, "a file is missing or has another MD5") from None
    parts = {part: (side.data, side.targets) for part, side in sides.items()}
    write_parts(folder, sides["train"].classes, parts)


def write_parts(
    folder: Path, classes: Sequence[str], parts: Mapping[str, tuple[np.ndarray, Sequence[int]]]
) -> None:
    """Writes folder/{train,val}/CLASS/NNNNN.png, numbered as in the original files.

    Args:
        classes: names, in label order.
        parts: pixels (N, H, W) or (N, H, W, 3) uint8, and labels (N,), of train and val.
    """
    for part, (images, labels) in parts.items():
        folders = [folder / part / name for name in classes]
        for of_class in folders:
            of_class.mkdir(parents=True)
        pairs = zip(images, labels, strict=True)
        bar = tqdm(pairs, part, len(labels), disable=not sys.stderr.isatty(), unit="image")
        for i, (pixels, label) in enumerate(bar):
            Image.fromarray(np.ascontiguousarray(pixels)).save(folders[label] / f"{i:05d}.png")


def _unpacked(file: Path, digest: str) -> bytes:
    """Returns the contents of `file`, or of `file`.gz unpacked.

    Raises:
        UserError: there is neither, or the SHA-256 of the contents is not `digest`.
    """
    packed = file.with_name(f"{file.name}.gz")
    source = file if file.is_file() else packed
    if not source.is_file():
        package = "; on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
        raise _missing("fashion", packed.name, file.parent, package)
    try:
        with gzip.open(source) if source is packed else open(source, "rb") as opened:
            data = opened.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(source, error) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise _bad(source, "its SHA-256 is another than the published")
    return data


def _fetch(name: str, folder: str) -> None:
    """Lets torchvision's reader of this name fetch the original files."""
    from torchvision import datasets

    try:
        getattr(datasets, name)(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--download: {printable(str(error))}; fetch the files elsewhere, and give their "
            "folder with --data-files",
            EXIT_FAILED,
        ) from None


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


@dataclass(frozen=True)
class DemoSet:
    """One data set.

    Args:
        write: fills an empty folder with train/ and val/; takes the folder and where the original
            files are.
        recipe: fields of a `Recipe` that its images need with a ResNet, whatever the --recipe.
        light: those that differ with MobileNetV2.
        needs_files: whether `write` reads original files.
    """

    write: Callable[[Path, Origin], None]
    recipe: Mapping[str, Any]
    light: Mapping[str, Any]
    needs_files: bool = True


DEMO_SETS: Mapping[str, DemoSet] = MappingProxyType(
    {
        "digits": DemoSet(
            write_digits,
            DIGITS_RECIPE,
            # MobileNetV2 halves a map 5 times, and takes longer than a ResNet to settle.
            {"img_size": 64, "epochs": 10, "lr": 0.03},
            needs_files=False,
        ),
        "fashion": DemoSet(write_fashion, PHOTOS_RECIPE, {}),
        "cifar10": DemoSet(partial(write_cifar, name="CIFAR10"), PHOTOS_RECIPE, {}),
        "cifar100": DemoSet(partial(write_cifar, name="CIFAR100"), PHOTOS_RECIPE, {}),
    }
)

DEMOS = ", ".join(PREFIX + name for name in DEMO_SETS)  # for messages


def is_demo(data: str | None) -> bool:
    """Whether DATA names a demo rather than a folder."""
    return data is not None and data.startswith(PREFIX)


def takes_files(data: str | None) -> bool:
    """Whether DATA names a demo that is made of original files."""
    return is_demo(data) and any(
        data == PREFIX + name and demo.needs_files for name, demo in DEMO_SETS.items()
    )


def recipes(arch: str, light: bool = False) -> dict[str, dict[str, Any]]:
    """Returns what each demo needs of a script's recipe, as {"demo:NAME": {field: value}}.

    Args:
        arch: the network of the demo.
        light: whether it is a MobileNetV2.
    """
    return {
        PREFIX + name: {"arch": arch, **demo.recipe, **(demo.light if light else {})}
        for name, demo in DEMO_SETS.items()
    }


def find_root(
    data: str, context: Context, files: str | None = None, download: bool = False
) -> str | Path:
    """Returns the folder that DATA names; demo data is written by rank 0 while the others wait.

    Args:
        data: a folder, or "demo:" with a name of `DEMO_SETS`.
        files, download: see `prepare`.

    Raises:
        UserError: see `prepare`.
    """
    if not is_demo(data):
        return data
    return share(prepare(data, files, download) if context.is_main else None, context)


def prepare(data: str, files: str | None = None, download: bool = False) -> Path:
    """Returns the folder of a demo's images, written the first time.

    Args:
        data: "demo:" with a name of `DEMO_SETS`.
        files: the folder of the data set's original files; None looks where a package puts them.
        download: let torchvision fetch them.

    Raises:
        UserError: another name; the original files are missing, or are not those that were
            published.
    """
    name = data.removeprefix(PREFIX)
    if name not in DEMO_SETS:
        hint = did_you_mean(data, DEMOS.split(", ")) or f"; there is {DEMOS}"
        raise UserError(f"no demo data {data!r}{hint}")
    origin = Origin(None if files is None else Path(files), download)
    return write_once(HOME / name, lambda folder: DEMO_SETS[name].write(folder, origin))


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
            reason = f"cannot write there ({why}); make room, or mend its rights"
            raise UserError(f"{target}: {reason}", EXIT_FAILED) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    here = Path.cwd()
    return target.relative_to(here) if target.is_relative_to(here) else target

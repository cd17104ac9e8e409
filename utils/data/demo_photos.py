"""demo:fashion, demo:cifar10 and demo:cifar100: small photographs as ImageFolder trees."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.data.original_files import CIFAR10, CIFAR100, Origin, Part, read_cifar, read_fashion
from utils.system.errors import EXIT_FAILED, UserError

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
FOLDER_NAME = re.compile(r"[a-z0-9_-]+")

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


def write_fashion(folder: Path, origin: Origin) -> None:
    """Writes Fashion-MNIST's 70,000 images of garments.

    Raises:
        UserError: see `read_fashion`.
    """
    write_parts(folder, FASHION_CLASSES, read_fashion(origin))


def write_cifar10(folder: Path, origin: Origin) -> None:
    """Writes CIFAR-10's 60,000 images.

    Raises:
        UserError: see `read_cifar`.
    """
    write_parts(folder, *read_cifar(origin, "cifar10", CIFAR10))


def write_cifar100(folder: Path, origin: Origin) -> None:
    """Writes CIFAR-100's 60,000 images, by their 100 fine classes.

    Raises:
        UserError: see `read_cifar`.
    """
    write_parts(folder, *read_cifar(origin, "cifar100", CIFAR100))


def write_parts(folder: Path, classes: Sequence[str], parts: Mapping[str, Part]) -> None:
    """Writes folder/{train,val}/CLASS/NNNNN.png, numbered as in the original files.

    Raises:
        UserError: a class has a name that is no folder's, or a label has no class.
    """
    if not all(map(FOLDER_NAME.fullmatch, classes)) or len(set(classes)) < len(classes):
        raise UserError("the class names are not those that were published", EXIT_FAILED)
    for part, images in parts.items():
        if len(images.pixels) != len(images.labels) or np.max(images.labels) >= len(classes):
            raise UserError(f"{part}: images, labels and classes do not fit", EXIT_FAILED)
        places = [folder / part / name for name in classes]
        for place in places:
            place.mkdir(parents=True)
        pairs = zip(images.pixels, images.labels, strict=True)
        bar = tqdm(pairs, part, len(images.labels), disable=not sys.stderr.isatty(), unit="image")
        for i, (pixels, label) in enumerate(bar):
            Image.fromarray(np.ascontiguousarray(pixels)).save(places[label] / f"{i:05d}.png")

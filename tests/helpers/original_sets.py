"""Small files in the formats of Fashion-MNIST and CIFAR, with checksums of their own."""

import gzip
import hashlib
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from utils.data import demo_sets

CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
Pixels = dict[str, tuple[np.ndarray, np.ndarray]]  # (N, …) uint8 and labels (N,) of train and val


def chance_images(count: int, *shape: int, classes: int = 10, seed: int = 0):
    """uint8 pixels (count, *shape) and labels (count,) that name each class in turn."""
    chance = np.random.default_rng(seed)
    return chance.integers(0, 256, (count, *shape), np.uint8), np.arange(count) % classes


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes, by the description on the MNIST page."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + bytes(
        array.tobytes()
    )


def write_fashion(
    folder: Path, patch: pytest.MonkeyPatch, train: int = 20, val: int = 10, packed: bool = True
) -> Pixels:
    """Writes the four files, and has the program expect them."""
    made, sums = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for part, prefix, count in (("train", "train", train), ("val", "t10k", val)):
        pixels, labels = made[part] = chance_images(count, 28, 28, seed=count)
        for name, array in (
            (f"{prefix}-images-idx3-ubyte", pixels),
            (f"{prefix}-labels-idx1-ubyte", labels.astype(np.uint8)),
        ):
            data = idx(array)
            sums[name] = hashlib.sha256(data).hexdigest()
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    patch.setattr(demo_sets, "FASHION_SHA256", sums)
    return made


def write_cifar(
    folder: Path, patch: pytest.MonkeyPatch, name: str = "CIFAR10", count: int = 10
) -> Pixels:
    """Writes the Python version, unpacked, as its description says: pixels (N, 3, 32, 32).

    torchvision's reader of this name is made to expect these files, and the archive of
    `pack_cifar`.
    """
    reader = getattr(datasets, name)
    place, made = folder / reader.base_folder, {"train": [], "val": []}
    place.mkdir(parents=True)
    fine, classes = name == "CIFAR100", 100 if name == "CIFAR100" else 10
    sums = {}

    def write(file: str, content: object) -> None:
        (place / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((place / file).read_bytes()).hexdigest()

    for part, attribute in (("train", "train_list"), ("val", "test_list")):
        files = [file for file, _ in getattr(reader, attribute)]
        for i, file in enumerate(files):
            pixels, labels = chance_images(count, 3, 32, 32, classes=classes, seed=i)
            key = "fine_labels" if fine else "labels"
            write(file, {"data": pixels.reshape(count, -1), key: labels.tolist()})
            made[part].append((pixels, labels))
        patch.setattr(reader, attribute, [[file, sums[file]] for file in files])
    names = [f"class_{i:02d}" for i in range(100)] if fine else list(CIFAR10_NAMES)
    write(reader.meta["filename"], {reader.meta["key"]: names})
    patch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
    return {
        part: tuple(map(np.concatenate, zip(*pairs, strict=True))) for part, pairs in made.items()
    }


def pack_cifar(folder: Path, patch: pytest.MonkeyPatch, name: str = "CIFAR10") -> Path:
    """Packs what `write_cifar` wrote into the archive that torchvision downloads."""
    reader = getattr(datasets, name)
    file = folder / reader.filename
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder / reader.base_folder, reader.base_folder)
    (folder / reader.base_folder).rename(folder / "elsewhere")
    patch.setattr(reader, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    return file

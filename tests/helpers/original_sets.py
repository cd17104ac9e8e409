"""Small files in the formats of Fashion-MNIST and CIFAR, with checksums of their own."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from utils.data import demo_photos, original_files

CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


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
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes the four files, and has the reader expect them: {"train": (pixels, labels), "val"}."""
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
    patch.setattr(original_files, "FASHION_SHA256", sums)
    return made


def write_binary(
    file: Path, kind: original_files.CifarSet, names: tuple[str, ...], per_file: int
) -> tuple[original_files.CifarSet, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Writes an archive of CIFAR's binary version: the kind with its SHA-256, and what is in it."""
    made, contents = {}, {kind.names: "\n".join(names).encode() + b"\n"}
    for part, of_part in kind.files.items():
        pairs = [
            chance_images(per_file, 3, 32, 32, classes=len(names), seed=len(name) + i)
            for i, name in enumerate(of_part)
        ]
        for name, (pixels, labels) in zip(of_part, pairs, strict=True):
            contents[name] = b"".join(
                bytes([7] * (kind.label_bytes - 1) + [label]) + image.tobytes()
                for image, label in zip(pixels, labels, strict=True)
            )
        made[part] = tuple(map(np.concatenate, zip(*pairs, strict=True)))
    with tarfile.open(file, "w:gz") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"a-folder/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return replace(kind, archive=(kind.archive[0], digest)), made


def write_pickles(folder: Path, count: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes cifar-10-batches-py as its description says; the checksums remain the real ones."""
    place, made = folder / "cifar-10-batches-py", {"train": [], "val": []}
    place.mkdir(parents=True)
    loader = datasets.CIFAR10
    for part, listed in (("train", loader.train_list), ("val", loader.test_list)):
        for i, (name, _) in enumerate(listed):
            pixels, labels = chance_images(count, 3, 32, 32, seed=i)
            data = {"data": pixels.reshape(count, -1), "labels": labels.tolist()}
            (place / name).write_bytes(pickle.dumps(data))
            made[part].append((pixels, labels))
    meta = {"label_names": list(CIFAR10_NAMES)}
    (place / loader.meta["filename"]).write_bytes(pickle.dumps(meta))
    return {
        part: tuple(map(np.concatenate, zip(*pairs, strict=True))) for part, pairs in made.items()
    }


def expect_pickles(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Has torchvision's loader expect the files of `write_pickles`."""
    place, loader = folder / "cifar-10-batches-py", datasets.CIFAR10

    def md5(name: str) -> str:
        return hashlib.md5((place / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        listed = [[name, md5(name)] for name, _ in getattr(loader, attribute)]
        patch.setattr(loader, attribute, listed)
    meta = loader.meta
    patch.setattr(loader, "meta", {**meta, "md5": md5(meta["filename"])})


def use_cifar10(kind: original_files.CifarSet, patch: pytest.MonkeyPatch) -> None:
    """Has demo:cifar10 expect this archive."""
    patch.setattr(demo_photos, "CIFAR10", kind)

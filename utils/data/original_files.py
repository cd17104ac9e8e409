"""Reads the original files of Fashion-MNIST and CIFAR as arrays, without running code from them.

Each file is compared with its published checksum before it is read. IDX files and CIFAR's binary
version are numbers alone, and numpy reads them here. CIFAR's Python version is a pickle, which
could run code when it is opened: torchvision's loader opens it, after its own checksums agree.
"""

import gzip
import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import printable

FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # of Debian and Ubuntu
FASHION_SHA256 = {  # unpacked: packages compress the same files anew
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_PARTS = {"train": "train", "val": "t10k"}  # the test images are what val/ holds
SIDE = 32  # pixels of a CIFAR image
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError)


@dataclass(frozen=True)
class Origin:
    """Says where a data set's original files are.

    Args:
        folder: that holds them, or None for where a package of the system puts them.
        download: whether torchvision is to fetch them.
    """

    folder: Path | None = None
    download: bool = False


@dataclass(frozen=True)
class Part:
    """Holds the images of train or of val.

    Args:
        pixels: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,) indices into the classes.
    """

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class CifarSet:
    """Describes what differs between the two CIFAR sets.

    Args:
        archive: file name of the binary version, and its SHA-256.
        files: of the binary version, for train and val.
        label_bytes: before each image's pixels; the last of them is its class.
        names: the file of the class names.
        loader: name of torchvision's, for the Python version.
    """

    archive: tuple[str, str]
    files: dict[str, tuple[str, ...]]
    label_bytes: int
    names: str
    loader: str


CIFAR10 = CifarSet(
    (
        "cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "val": ("test_batch.bin",)},
    1,
    "batches.meta.txt",
    "CIFAR10",
)
CIFAR100 = CifarSet(
    (
        "cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    {"train": ("train.bin",), "val": ("test.bin",)},
    2,
    "fine_label_names.txt",
    "CIFAR100",
)


def read_fashion(origin: Origin) -> dict[str, Part]:
    """Reads Fashion-MNIST as {"train": 60,000 images, "val": 10,000} of 28 × 28 grey pixels.

    Raises:
        UserError: files are missing or are not those that were published; or the download failed.
    """
    if origin.download:
        with tempfile.TemporaryDirectory() as folder:
            from torchvision import datasets  # slow to import

            _fetch(datasets.FashionMNIST, folder)
            return _read_fashion(Path(folder) / "FashionMNIST" / "raw")
    folder = origin.folder or FASHION_PACKAGE
    inner = folder / "FashionMNIST" / "raw"  # as torchvision leaves them
    folder = inner if inner.is_dir() else folder
    for name in FASHION_SHA256:
        if not any((folder / f"{name}{ending}").is_file() for ending in ("", ".gz")):
            package = "; on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
            raise _missing("fashion", f"{name}.gz", folder, package)
    return _read_fashion(folder)


def read_cifar(
    origin: Origin, name: str, kind: CifarSet
) -> tuple[tuple[str, ...], dict[str, Part]]:
    """Reads a CIFAR set: its class names in label order, and its images as {"train", "val"}.

    In `origin.folder` the binary version's archive, the Python version's folder and the Python
    version's archive are looked for, in this order.

    Args:
        name: as in demo:NAME, for messages.

    Raises:
        UserError: files are missing or are not those that were published; or the download failed.
    """
    from torchvision import datasets  # slow to import

    loader = getattr(datasets, kind.loader)
    if origin.download:
        with tempfile.TemporaryDirectory() as folder:
            _fetch(loader, folder)
            return _by_torchvision(loader, Path(folder))
    archive, digest = kind.archive
    if origin.folder is None:
        raise _missing(name, archive, None)
    if (file := origin.folder / archive).is_file():
        return _read_binary(file, digest, kind)
    if (origin.folder / loader.base_folder).is_dir():
        return _by_torchvision(loader, origin.folder)
    if (file := origin.folder / loader.filename).is_file():
        with tempfile.TemporaryDirectory() as folder:
            _unpack(file, loader, Path(folder))
            return _by_torchvision(loader, Path(folder))
    raise _missing(name, f"{archive} or {loader.filename}", origin.folder)


def read_idx(data: bytes, dimensions: int) -> np.ndarray:
    """Returns the uint8 array of an IDX file.

    Raises:
        ValueError: another type or number of dimensions, or another length than it says.
    """
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"no IDX file of bytes in {dimensions} dimensions")
    shape = tuple(np.frombuffer(data[4:head], ">u4").astype(int).tolist())
    body = np.frombuffer(data, np.uint8, offset=head)
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"holds {body.size} values where {shape} is said")
    return body.reshape(shape)


def read_records(data: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels (N, 32, 32, 3) and labels (N,) of a file of CIFAR's binary version.

    Raises:
        ValueError: its length is no multiple of a record's.
    """
    length = label_bytes + 3 * SIDE * SIDE
    if not data or len(data) % length:
        raise ValueError(f"{len(data)} bytes are no records of {length}")
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    planes = records[:, label_bytes:].reshape(-1, 3, SIDE, SIDE)
    return planes.transpose(0, 2, 3, 1), records[:, label_bytes - 1]


def _read_fashion(folder: Path) -> dict[str, Part]:
    parts = {}
    for part, prefix in FASHION_PARTS.items():
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        pixels, labels = (
            read_idx(_checked(folder / name, FASHION_SHA256[name]), dimensions)
            for name, dimensions in zip(names, (3, 1), strict=True)
        )
        parts[part] = Part(pixels, labels)
    return parts


def _checked(file: Path, digest: str) -> bytes:
    """Returns the contents of `file`, or of `file`.gz unpacked, after comparing the checksum."""
    packed = file.with_name(f"{file.name}.gz")
    try:
        data = file.read_bytes() if file.is_file() else gzip.decompress(packed.read_bytes())
    except UNREADABLE as error:
        raise _bad(packed if packed.is_file() else file, error) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise _bad(file if file.is_file() else packed, "its SHA-256 is another than the published")
    return data


def _read_binary(
    file: Path, digest: str, kind: CifarSet
) -> tuple[tuple[str, ...], dict[str, Part]]:
    try:
        with open(file, "rb") as opened, _checked_archive(opened, file, digest) as archive:
            members = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}

            def read(name: str) -> bytes:
                if name not in members:
                    raise ValueError(f"lacks {name}")
                return archive.extractfile(members[name]).read()

            names = tuple(read(kind.names).decode("ascii").split())
            parts = {
                part: _joined([read_records(read(name), kind.label_bytes) for name in of_part])
                for part, of_part in kind.files.items()
            }
    except UNREADABLE as error:
        raise _bad(file, error) from None
    return names, parts


def _checked_archive(opened: BinaryIO, file: Path, digest: str) -> tarfile.TarFile:
    found = hashlib.sha256()
    while block := opened.read(1 << 20):
        found.update(block)
    if found.hexdigest() != digest:
        raise _bad(file, "its SHA-256 is another than the published")
    opened.seek(0)
    return tarfile.open(fileobj=opened)


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Part:
    pixels, labels = zip(*pairs, strict=True)
    return Part(np.concatenate(pixels), np.concatenate(labels))


def _by_torchvision(loader: type, folder: Path) -> tuple[tuple[str, ...], dict[str, Part]]:
    """Has torchvision open the pickles, which it does where all their MD5 sums agree."""
    try:
        sides = {"train": loader(folder, train=True), "val": loader(folder, train=False)}
    except (RuntimeError, *UNREADABLE):
        raise _bad(folder / loader.base_folder, "a file is missing or has another MD5") from None
    parts = {part: Part(side.data, np.asarray(side.targets)) for part, side in sides.items()}
    return tuple(sides["train"].classes), parts


def _unpack(file: Path, loader: type, folder: Path) -> None:
    """Writes the files that torchvision's loader reads, and no other, from an archive."""
    listed = [*loader.train_list, *loader.test_list]
    wanted = [name for name, _ in listed] + [loader.meta["filename"]]
    place = folder / loader.base_folder
    place.mkdir()
    try:
        with tarfile.open(file) as archive:
            for name in wanted:
                member = archive.extractfile(f"{loader.base_folder}/{name}")
                (place / name).write_bytes(member.read())
    except (KeyError, AttributeError, *UNREADABLE) as error:
        raise _bad(file, error) from None


def _fetch(loader: type, folder: str) -> None:
    try:
        loader(folder, download=True)
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

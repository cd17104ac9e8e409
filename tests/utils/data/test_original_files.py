"""The readers of Fashion-MNIST and CIFAR: the right pixels, and no code of a file ever runs."""

import gzip
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.original_sets import (
    CIFAR10_NAMES,
    expect_pickles,
    idx,
    write_binary,
    write_fashion,
    write_pickles,
)

from utils.data.original_files import (
    CIFAR10,
    CIFAR100,
    FASHION_PACKAGE,
    Origin,
    read_cifar,
    read_fashion,
    read_idx,
    read_records,
)
from utils.system.errors import UserError


def assert_equal(part, pixels, labels):
    assert np.array_equal(part.pixels, pixels)
    assert np.array_equal(part.labels, labels)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_fashion_from_a_folder(tmp_path, monkeypatch, packed, inner):
    made = write_fashion(tmp_path / inner, monkeypatch, packed=packed)
    found = read_fashion(Origin(tmp_path))
    assert found.keys() == made.keys()
    for part, pair in made.items():
        assert_equal(found[part], *pair)


def test_fashion_agrees_with_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    write_fashion(tmp_path / "FashionMNIST" / "raw", monkeypatch, packed=False)
    found = read_fashion(Origin(tmp_path))
    for part, theirs in (("train", FashionMNIST(tmp_path)), ("val", FashionMNIST(tmp_path, False))):
        assert_equal(found[part], theirs.data.numpy(), theirs.targets.numpy())


@pytest.mark.skipif(not FASHION_PACKAGE.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_package_holds_what_was_published():
    found = read_fashion(Origin())
    assert found["train"].pixels.shape == (60_000, 28, 28)
    for part, count in (("train", 6000), ("val", 1000)):
        assert np.bincount(found[part].labels).tolist() == [count] * 10


def test_without_files_both_ways_are_named(tmp_path):
    line = (
        r"demo:fashion .*: no train-images-idx3-ubyte.gz in .*--data-files DIR\), or .*--download\)"
        ".*apt-get install dataset-fashion-mnist"
    )
    with pytest.raises(UserError, match=line):
        read_fashion(Origin(tmp_path))
    for folder in (None, tmp_path):
        with pytest.raises(
            UserError, match=r"demo:cifar10 .*--data-files DIR\), or .*--download\)"
        ):
            read_cifar(Origin(folder), "cifar10", CIFAR10)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    good = file.read_bytes()
    changed = bytearray(gzip.decompress(good))
    changed[-1] ^= 1
    file.write_bytes(gzip.compress(changed))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz: its SHA-256 is another"):
        read_fashion(Origin(tmp_path))
    file.write_bytes(good[:-9])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz: "):
        read_fashion(Origin(tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\x08\x03\0\0",
        idx(np.zeros((2, 3), np.uint8)),
        idx(np.zeros((2, 3, 4), np.uint8))[:-1],
        idx(np.zeros((2, 3, 4), np.uint8)) + b"\0",
        b"\0\0\x0d\x03" + bytes(12),
        b"\0\0\x08\x03" + b"\xff" * 12,
    ],
)
def test_what_is_no_idx_file(data):
    with pytest.raises(ValueError, match=r"no IDX file|values where"):
        read_idx(data, 3)


@pytest.mark.parametrize(("kind", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_from_the_binary_version(tmp_path, kind, classes):
    names = CIFAR10_NAMES if classes == 10 else tuple(f"class_{i:02d}" for i in range(100))
    kind, made = write_binary(tmp_path / kind.archive[0], kind, names, per_file=100)
    found_names, found = read_cifar(Origin(tmp_path), "x", kind)
    assert found_names == names
    for part, (pixels, labels) in made.items():
        assert_equal(found[part], pixels.transpose(0, 2, 3, 1), labels)


def test_a_changed_archive_is_refused(tmp_path):
    file = tmp_path / CIFAR10.archive[0]
    write_binary(file, CIFAR10, CIFAR10_NAMES, 2)
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz: its SHA-256 is another"):
        read_cifar(Origin(tmp_path), "cifar10", CIFAR10)


def test_records_of_another_length():
    with pytest.raises(ValueError, match="3074 bytes are no records of 3073"):
        read_records(bytes(3074), 1)


def test_cifar_pickles_are_opened_where_the_checksums_agree(tmp_path, monkeypatch):
    made = write_pickles(tmp_path)
    expect_pickles(tmp_path, monkeypatch)
    names, found = read_cifar(Origin(tmp_path), "cifar10", CIFAR10)
    assert names == CIFAR10_NAMES
    for part, (pixels, labels) in made.items():
        assert_equal(found[part], pixels.transpose(0, 2, 3, 1), labels)

    # The same from the archive that torchvision downloads.
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py").rename(tmp_path / "elsewhere")
    _, again = read_cifar(Origin(tmp_path), "cifar10", CIFAR10)
    assert_equal(again["val"], found["val"].pixels, found["val"].labels)


class Payload:
    """Makes a file when its pickle is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("changed", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_changed_pickle_is_never_opened(tmp_path, monkeypatch, changed, packed):
    write_pickles(tmp_path)
    expect_pickles(tmp_path, monkeypatch)
    folder, mark = tmp_path / "cifar-10-batches-py", tmp_path / "ran"
    (folder / changed).write_bytes(pickle.dumps(Payload(mark)))
    pickle.loads((folder / changed).read_bytes())
    assert mark.exists()  # the payload works where it is opened
    mark.unlink()
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match="cifar-10-batches-py: a file is missing or has another MD5"
    ):
        read_cifar(Origin(tmp_path), "cifar10", CIFAR10)
    assert not mark.exists()

"""Shards in a store, which is fsspec's own in memory."""

import multiprocessing
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.shard_sets import make
from helpers.trees import write_tree

from tests.utils.data.test_shards import assert_same_images
from tools.check_images import find_images
from utils.data import loader
from utils.data.loader import ImageDataset
from utils.data.shards import NAME, open_split, read_range, read_whole
from utils.data.transforms import Preprocessing
from utils.system.errors import EXIT_FAILED, UserError


@pytest.fixture
def store(tmp_path, monkeypatch):
    """(class folders, the URL of the same images in shards)."""
    source = write_tree(tmp_path / "source", train=2, val=1)
    local = make(monkeypatch, source, tmp_path / "local")
    fs = fsspec.filesystem("memory")
    fs.put(f"{local}/", "/bucket/data/", recursive=True)
    yield source, "memory://bucket/data"
    fs.rm("/bucket", recursive=True)


def test_shards_in_a_store_are_the_folder(store):
    source, url = store
    for folder, in_shards in zip(open_split(str(source)), open_split(f"{url}/"), strict=True):
        assert_same_images(folder, in_shards)
    assert str(in_shards.path(0)) == f"{url}/val/val-00000.tar:a/0.png"
    members, _ = find_images(url)
    assert len(members) == 9


def test_a_store_needs_the_index_whole(store):
    _, url = store
    fs, name = fsspec.filesystem("memory"), f"/bucket/data/train/{NAME}"
    whole = fs.cat_file(name)
    fs.pipe(name, whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"train/{NAME}: damaged, cut short.*; make it where"):
        open_split(url)
    fs.rm(name)
    with pytest.raises(UserError, match=rf"data/train: no {NAME} there, .* upload it with them"):
        open_split(url)


def test_another_shard_than_the_index_s_is_named(store):
    _, url = store
    _, val = open_split(url)
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/data/val/val-00000.tar", bytes(100_000))
    with pytest.raises(UserError, match=r"val-00000\.tar:a/0\.png: the shard has changed since"):
        val.path(0).read()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_ignores_ranges_or_sends_too_little_is_named(store, monkeypatch, ranges):
    """Without ranges its answer is the beginning of the file, and not the image."""
    _, val = open_split(store[1])
    member = val.path(1)
    whole = fsspec.filesystem("memory").cat_file("/bucket/data/val/val-00000.tar")
    sent = whole[member.offset - 512 : member.offset + member.size - 1] if ranges else whole
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: sent)
    with pytest.raises(UserError, match=r"val-00000\.tar:.*the server ignores ranges"):
        member.read()


def test_a_store_that_fails_ends_in_a_line(store, monkeypatch):
    """No image takes the place of one that a store does not give."""
    _, val = open_split(store[1])

    def fail(*arguments, **options):
        raise TimeoutError("slow\ndown")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(UserError, match=r"val-00000\.tar: TimeoutError slow; check the add") as end:
        val.path(0).read()
    assert end.value.exit_code == EXIT_FAILED
    fault = ImageDataset(val, Preprocessing(32, 1.0), skip_broken=True)[0, 0]
    assert isinstance(fault, UserError)
    assert loader._collate([fault]) is fault


def test_what_a_store_lacks(store):
    _, url = store
    assert read_whole(f"{url}/gone.txt") is None
    _, val = open_split(url)
    fsspec.filesystem("memory").rm("/bucket/data/val/val-00000.tar")
    with pytest.raises(UserError, match=r"val-00000\.tar: no such file; see to it, and go on"):
        val.path(0).read()
    with pytest.raises(UserError, match=r"nowhere://bucket/train.*: .*Protocol not known: nowhere"):
        open_split("nowhere://bucket")


def _read_in_worker(path):
    return read_range(path, 2, 3)


def test_workers_open_files_of_their_own(tmp_path):
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.tar"))
        Path(paths[-1]).write_bytes(b"01%d34567" % number)
    assert [read_range(path, 2, 3) for path in paths] == [b"034", b"134", b"234"]
    assert read_range(paths[0], 6, 9) == b"67"  # no more is there
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read_in_worker, paths * 2) == [b"034", b"134", b"234"] * 2

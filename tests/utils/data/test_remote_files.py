"""Ranges of local files, and of a store: fsspec's own, in memory, as no other is reached here."""

import io
import itertools
import multiprocessing

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.shard_sets import make
from helpers.trees import write_tree

from tests.utils.data.test_shard_folder import assert_same_images
from tools.check_images import find_images
from utils.data import loading, remote_files, shard_index
from utils.data.loading import ImageDataset, eval_transform
from utils.data.splits import open_split
from utils.system.errors import UserError


@pytest.fixture
def store(tmp_path, monkeypatch):
    """(class folders, the URL of the same images in shards)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


def test_without_an_index_there_one_is_made_in_the_cache(store, tmp_path, monkeypatch):
    source, url = store
    fs = fsspec.filesystem("memory")
    for part in ("train", "val"):
        fs.rm(f"/bucket/data/{part}/{shard_index.NAME}")
    for folder, in_shards in zip(open_split(str(source)), open_split(url), strict=True):
        assert_same_images(folder, in_shards)
    assert len(list((tmp_path / "cache" / "eca-net").iterdir())) == 2
    monkeypatch.setattr(shard_index, "make_index", None)  # it is found the next time
    open_split(url)


def test_indexing_starts_a_shard_again(store, tmp_path, monkeypatch):
    """A read inside of a shard fails, not the opening of it, as when a connection breaks."""
    source, url = store
    fsspec.filesystem("memory").rm(f"/bucket/data/train/{shard_index.NAME}")
    monkeypatch.setattr(remote_files, "PAUSES", (0, 0, 0))
    failures, calls = [4], itertools.count()  # the reads that fail

    class Flaky(io.BytesIO):
        def read(self, *arguments):
            if next(calls) in failures:
                raise TimeoutError("slow\ndown")
            return super().read(*arguments)

    opened = MemoryFileSystem.open
    monkeypatch.setattr(
        MemoryFileSystem,
        "open",
        lambda fs, path, mode="rb", **k: (
            Flaky(fs.cat_file(path))
            if (path[-4:], mode) == (".tar", "rb")
            else opened(fs, path, mode, **k)
        ),
    )
    found = shard_index.find_index(f"{url}/train")
    assert next(calls) > 5
    wanted = shard_index.find_index(str(tmp_path / "local/train"))
    assert found.names.tolist() == wanted.names.tolist()
    assert found.members.tolist() == wanted.members.tolist()
    assert found.ignored == {}
    assert_same_images(open_split(str(source))[0], open_split(url)[0])

    (cached,) = (tmp_path / "cache" / "eca-net").iterdir()
    cached.unlink()
    failures = range(1000)
    with pytest.raises(UserError, match=r"train-00000\.tar: TimeoutError slow \(4 tries\); check"):
        shard_index.find_index(f"{url}/train")

    # What is damaged is so the next time: no second try.
    failures, calls = [], itertools.count()
    fsspec.filesystem("memory").pipe("/bucket/data/train/train-00000.tar", b"no tar" * 200)
    with pytest.raises(UserError, match="damaged or cut short"):
        shard_index.find_index(f"{url}/train")
    assert next(calls) == 1


def test_a_server_that_lists_nothing_needs_the_index(store, monkeypatch):
    source, url = store
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: [])
    assert_same_images(open_split(str(source))[1], open_split(url)[1])
    fsspec.filesystem("memory").rm(f"/bucket/data/train/{shard_index.NAME}")
    with pytest.raises(UserError, match=r"train: no tar shards there, and no shard-index\.npz"):
        open_split(url)


def test_requests_are_made_again(store, monkeypatch):
    _, val = open_split(store[1])
    failures = [TimeoutError("slow\ndown")] * 3
    monkeypatch.setattr(remote_files, "PAUSES", (0, 0, 0))
    cat_file = MemoryFileSystem.cat_file

    def flaky(*arguments, **options):
        if failures:
            raise failures.pop()
        return cat_file(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    assert val.path(0).read()
    failures += [TimeoutError("slow\ndown")] * 8
    with pytest.raises(UserError, match=r"val-00000\.tar: TimeoutError slow \(4 tries\); check"):
        val.path(0).read()

    # No image takes the place of one that a store does not give, and the run ends in a line.
    dataset = ImageDataset(val, eval_transform(32, 1.0), skip_broken=True)
    fault = dataset[0, 0]
    assert isinstance(fault, UserError)
    assert loading._collate([fault]) is fault


def test_what_a_store_lacks(store):
    _, url = store
    with pytest.raises(UserError, match="no such file; was it removed"):
        remote_files.read_range(f"{url}/gone.tar", 0, 8)
    assert remote_files.read_whole(f"{url}/gone.txt") is None
    with pytest.raises(UserError, match="bucket/other/train: no tar shards there"):
        open_split("memory://bucket/other")
    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        open_split("nowhere://bucket")


def test_a_missing_package_is_named(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(UserError, match=r"s3://bucket/train: Install s3fs to access S3"):
        open_split("s3://bucket")


def _read_in_worker(path):
    return remote_files.read_range(path, 2, 3)


def test_workers_open_files_of_their_own(tmp_path):
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.tar"))
        with open(paths[-1], "wb") as file:
            file.write(b"01%d34567" % number)
    assert [remote_files.read_range(path, 2, 3) for path in paths] == [b"034", b"134", b"234"]
    assert remote_files.read_range(paths[0], 6, 9) == b"67"  # no more is there
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(_read_in_worker, paths * 2) == [b"034", b"134", b"234"] * 2


@pytest.mark.parametrize(
    "url",
    ["ftp://127.0.0.1:1/x", "zip://a::file:///dev/null", "reference://x", "nothing://x", "://x"],
)
def test_a_store_that_cannot_be_opened_is_one_line(monkeypatch, url):
    monkeypatch.setattr(remote_files, "PAUSES", ())
    with pytest.raises(UserError) as caught:
        remote_files.read_range(url, 0, 1)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(url)

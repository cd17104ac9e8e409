"""The index of tar shards: when it is made, kept, believed and made again."""

import dataclasses
import io
import multiprocessing
import os
import tarfile
import time

import numpy as np
import pytest
from helpers.shard_sets import write_tar

from utils.data import shard_index
from utils.data.shard_index import NAME, ShardIndex, find_index
from utils.system.errors import UserError

PAIR = [("a/0.png", b"image"), ("a/0.cls", b"0")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "shards" / "0.tar", PAIR)
    write_tar(tmp_path / "shards" / "1.tar", [("b/0.jpg", b"other image"), ("b/0.cls", b"3")])
    return tmp_path / "shards"


@pytest.fixture
def made(monkeypatch):
    """Counts how often an index is made."""
    calls, make_index = [], shard_index.make_index

    def counted(*arguments):
        calls.append(arguments)
        return make_index(*arguments)

    monkeypatch.setattr(shard_index, "make_index", counted)
    return calls


def test_places_and_labels(folder):
    index = find_index(str(folder))
    assert index.shards == ("0.tar", "1.tar")
    assert index.names.tolist() == [b"a/0.png", b"b/0.jpg"]
    assert index.labels.tolist() == [0, 3]
    for name, content in zip(index.shards, (b"image", b"other image"), strict=True):
        member = index.members[index.shards.index(name)]
        data = (folder / name).read_bytes()
        assert data[member["offset"] : member["offset"] + member["size"]] == content


def test_it_is_kept_beside_the_shards_until_they_change(folder, made):
    first = find_index(str(folder))
    assert find_index(str(folder)).names.tolist() == first.names.tolist()
    assert len(made) == 1
    write_tar(folder / "2.tar", [*PAIR, ("c/0.png", bytes(20_000)), ("c/0.cls", b"1")])
    assert find_index(str(folder)).labels.tolist() == [0, 3, 0, 1]
    assert len(made) == 2
    write_tar(folder / "2.tar", [*PAIR, ("c/0.png", bytes(40_000)), ("c/0.cls", b"1")])
    find_index(str(folder))
    assert len(made) == 3
    (folder / "2.tar").unlink()
    find_index(str(folder))
    assert len(made) == 4
    os.utime(folder / "1.tar", (0, 0))  # a copy has another time, and is the same
    find_index(str(folder))
    assert len(made) == 4


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_index_is_made_again(folder, made, damage):
    whole = find_index(str(folder)).to_bytes()
    (folder / NAME).write_bytes(damage(whole))
    find_index(str(folder))
    assert len(made) == 2
    assert (folder / NAME).read_bytes() == whole


def test_a_folder_that_cannot_be_written_leaves_it_to_the_cache(folder, made, monkeypatch):
    def refuse(path, data):
        if path.parent == folder:
            raise UserError("read-only")
        path.write_bytes(data)

    monkeypatch.setattr(shard_index, "write_atomically", refuse)
    for _ in range(2):
        assert len(find_index(str(folder)).names) == 2
    assert len(made) == 1
    assert not (folder / NAME).exists()

    # And a cache that cannot be written either costs time alone.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert len(find_index(str(folder)).names) == 2
    assert len(made) == 2


def test_many_processes_make_one_index(folder, tmp_path, monkeypatch):
    """As the processes of a run that start together on one machine."""
    log, make_index = tmp_path / "log", shard_index.make_index

    def slowly(*arguments):
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return make_index(*arguments)

    monkeypatch.setattr(shard_index, "make_index", slowly)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(_names, [str(folder)] * 3, chunksize=1)
    assert found == [[b"a/0.png", b"b/0.jpg"]] * 3
    assert log.read_text() == "made\n"


def _names(folder):
    return find_index(folder).names.tolist()


def test_no_shards_no_index(tmp_path):
    assert find_index(str(tmp_path)) is None
    assert find_index(str(tmp_path / "gone")) is None


def test_another_version_is_made_again(folder, monkeypatch):
    data = find_index(str(folder)).to_bytes()
    assert ShardIndex.from_bytes(data) is not None
    monkeypatch.setattr(shard_index, "VERSION", shard_index.VERSION + 1)
    assert ShardIndex.from_bytes(data) is None


def headless(data: bytes) -> bytes:
    """With a damaged header of the second file, which tarfile takes for the end."""
    return data[:1024] + b"\xff" * 512 + data[1536:]


@pytest.mark.parametrize(
    "damage",
    [headless, lambda b: b[:700], lambda b: b[:1024], lambda b: b"", lambda b: b"no tar" * 200],
    ids=["header", "inside a file", "between files", "empty", "no tar"],
)
def test_damaged_shards_are_named(folder, damage):
    (folder / "1.tar").write_bytes(damage((folder / "1.tar").read_bytes()))
    with pytest.raises(UserError, match=r"shards/1\.tar: damaged or cut short \(.*\); copy or"):
        find_index(str(folder))
    assert not (folder / NAME).exists()


@pytest.mark.parametrize(
    "content",
    [b"cat", b"-1", b"", b"1.5", b"1" + b"0" * 18, b"%d" % 2**63, b"9" * 100_000, b"1000000"],
)
def test_what_is_no_class_number(folder, content):
    write_tar(folder / "2.tar", [("x.png", b"x"), ("x.cls", content)])
    with pytest.raises(UserError, match=r"2\.tar:x\.cls: holds b'.*', not the number of a class"):
        find_index(str(folder))


def test_what_is_passed_over_is_counted(folder):
    members = [*PAIR, ("a/._0.png", b"x"), ("a/1.png", b"x"), ("a/0.json", b"{}"), ("README", b"")]
    with tarfile.open(write_tar(folder / "0.tar", members), "a") as tar:
        link = tarfile.TarInfo("a/2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
        part = tarfile.TarInfo("a")
        part.type = tarfile.DIRTYPE
        tar.addfile(part, io.BytesIO())
    assert find_index(str(folder)).ignored == {
        "hidden": 1,
        "image without .cls": 1,
        ".json": 1,
        "no ending": 1,
        "link": 1,
    }


def test_a_sparse_file_is_no_image(folder):
    """Its header claims the size of what it is unpacked to; its bytes lie there in pieces."""
    data = write_tar(folder / "0.tar", [*PAIR, ("s.png", b"x"), ("s.cls", b"1")]).read_bytes()
    info = tarfile.TarInfo("s.png")
    info.size, info.type = 1, tarfile.GNUTYPE_SPARSE
    start = data.index(b"s.png")
    sparse = info.tobuf(tarfile.GNU_FORMAT)
    (folder / "0.tar").write_bytes(data[:start] + sparse + data[start + len(sparse) :])
    found = find_index(str(folder))
    assert found.names.tolist() == [b"a/0.png", b"b/0.jpg"]
    assert found.ignored == {"sparse": 1}


@pytest.mark.parametrize("text", ["x", "1", "9" * 30 + ",1", ""])
def test_a_sparse_header_without_numbers_is_one_line(folder, text):
    info = tarfile.TarInfo("s.png")
    info.pax_headers = {"GNU.sparse.map": text, "GNU.sparse.size": text or "x"}
    with tarfile.open(folder / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
        image = tarfile.TarInfo("a.png")
        tar.addfile(image)
    (folder / "1.tar").unlink()
    with pytest.raises(UserError, match=r"0\.tar: damaged or cut short|no image with its class"):
        find_index(str(folder))


PARTS = ("names", "labels", "members")
WRONG = {
    "labels of 2^62": lambda index: {"labels": np.full(2, 2**62)},
    "negative labels": lambda index: {"labels": np.array([0, -1])},
    "too few labels": lambda index: {"labels": index.labels[:1]},
    "float labels": lambda index: {"labels": index.labels / 1},
    "names of numbers": lambda index: {"names": np.arange(2)},
    "two axes": lambda index: {"members": index.members[:, None]},
    "no images": lambda index: {part: getattr(index, part)[:0] for part in PARTS},
    "a shard that is not there": lambda index: {"members": changed(index, "shard", 2)},
    "a negative shard": lambda index: {"members": changed(index, "shard", -1)},
    "an offset beyond the end": lambda index: {"members": changed(index, "offset", 2**62)},
    "a size of 2^63 - 1": lambda index: {"members": changed(index, "size", 2**63 - 1)},
    "a negative size": lambda index: {"members": changed(index, "size", -5)},
}


def changed(index, part, value):
    members = index.members.copy()
    members[part][1] = value
    return members


@pytest.mark.parametrize("fault", WRONG)
def test_an_index_with_wrong_arrays_is_made_again(folder, made, fault):
    good = find_index(str(folder))
    bad = dataclasses.replace(good, **WRONG[fault](good))
    (folder / NAME).write_bytes(bad.to_bytes())
    found = find_index(str(folder))
    assert len(made) == 2
    assert found.labels.tolist() == [0, 3]
    assert found.members.tolist() == good.members.tolist()

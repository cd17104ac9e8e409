"""Files appear whole or not at all, whatever fails on the way."""

import contextlib
import errno
import os

import pytest

from utils.system import files
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import read_json, remove_leftovers, write_atomically


class FailingDisk:
    """Lets one operation of a write fail with `number`, as a disk would."""

    def __init__(self, monkeypatch, step, number):
        self.step, self.number = step, number
        self.seen = {"replace": 0, "fsync": 0}
        self.real = {"replace": os.replace, "fsync": os.fsync}
        monkeypatch.setattr(files.os, "replace", lambda *a: self.call("replace", *a))
        monkeypatch.setattr(files.os, "fsync", lambda *a: self.call("fsync", *a))

    def call(self, name, *arguments):
        self.seen[name] += 1
        reached = {
            ("fsync", 1): "fsync",
            ("replace", 1): "first rename",
            ("replace", 2): "second rename",
            ("fsync", 2): "fsync folder",
        }.get((name, self.seen[name]))
        if reached == self.step:
            raise OSError(self.number, os.strerror(self.number))
        return self.real[name](*arguments)


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request, monkeypatch):
    """Whether the file system has hard links."""

    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not request.param:
        monkeypatch.setattr(files.os, "link", refuse)
    return request.param


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_new_file_replaces_or_retires_the_old_one(tmp_path, links):
    path, former = tmp_path / "last", tmp_path / "previous"
    for data in (b"one", b"two", b"three"):
        write_atomically(path, data, retire_to=former)
    assert contents(tmp_path) == {"last": b"three", "previous": b"two"}
    write_atomically(path, memoryview(b"four"))
    assert contents(tmp_path) == {"last": b"four", "previous": b"two"}


def test_data_is_flushed_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch, links):
    done = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "data")
        real_fsync(handle)

    def replace(source, target):
        done.append(f"to {os.path.basename(target)}")
        real_replace(source, target)

    (tmp_path / "last").write_bytes(b"old")
    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_atomically(tmp_path / "last", b"new", retire_to=tmp_path / "previous")
    renames = ["to last", "to previous"] if links else ["to previous", "to last"]
    assert done == ["data", *renames, "folder"]


@pytest.mark.parametrize("step", ["fsync", "first rename", "second rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, links, step, number
):
    write_atomically(tmp_path / "last", b"old")
    FailingDisk(monkeypatch, step, number)
    with pytest.raises(UserError) as caught:
        write_atomically(tmp_path / "last", b"new", retire_to=tmp_path / "previous")
    assert contents(tmp_path) == {"last": b"old"}
    assert caught.value.exit_code == EXIT_FAILED
    assert str(tmp_path / "last") in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_says_how_much_is_needed(tmp_path, monkeypatch):
    FailingDisk(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(UserError, match=r"2\.5 MB needed, [\d,.]+ MB free"):
        write_atomically(tmp_path / "last", bytes(2_500_000))


def test_a_file_system_that_cannot_flush_folders_is_no_fault(tmp_path, monkeypatch):
    FailingDisk(monkeypatch, "fsync folder", errno.EINVAL)
    write_atomically(tmp_path / "last", b"new")
    assert contents(tmp_path) == {"last": b"new"}


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone/last: No such file"):
        write_atomically(tmp_path / "gone" / "last", b"new")


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    for name in (".last.pth.tmp-123", "last.pth", ".lock", "notes.tmp-1"):
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert set(contents(tmp_path)) == {"last.pth", ".lock", "notes.tmp-1"}


@pytest.mark.parametrize("word", ["tmp", "kept.tmp"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder"])
def test_what_has_a_temporary_s_name_is_never_followed_nor_removed(
    tmp_path, monkeypatch, word, kind
):
    """As if a stranger's archive could foresee the name."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "ab")
    target, folder = tmp_path / "diary", tmp_path / "run"
    folder.mkdir()
    (folder / "last").write_bytes(b"old")
    planted = folder / f".last.{word}-ab"
    if kind == "folder":
        planted.mkdir()
    else:
        planted.symlink_to(target)
    if kind == "link":
        target.write_bytes(b"mine")
    with contextlib.suppress(UserError):
        write_atomically(folder / "last", b"new", retire_to=folder / "previous")
    assert target.read_bytes() == b"mine" if kind == "link" else not target.exists()
    assert (folder / "last").read_bytes() in (b"old", b"new")
    assert planted.is_dir() == (kind == "folder")
    remove_leftovers(folder)
    assert planted.is_dir() == (kind == "folder")


@pytest.mark.parametrize("name", ["last", "previous"])
def test_links_under_the_files_own_names_are_replaced_not_followed(tmp_path, name):
    target, folder = tmp_path / "diary", tmp_path / "run"
    target.write_bytes(b"mine")
    folder.mkdir()
    (folder / "last").write_bytes(b"old")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    write_atomically(folder / "last", b"new", retire_to=folder / "previous")
    assert target.read_bytes() == b"mine"
    assert (folder / "last").read_bytes() == b"new"
    write_atomically(folder / "last", b"newer", retire_to=folder / "previous")
    assert contents(folder) == {"last": b"newer", "previous": b"new"}
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("number", [f"-{2**64}", "9" * 5000])
def test_longer_ones_are_refused(tmp_path, number):
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(UserError, match=f"a whole number of {len(number.strip('-'))} digits"):
        read_json(tmp_path / "a.json", "x")

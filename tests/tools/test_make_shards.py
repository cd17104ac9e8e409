"""python -m tools.make_shards: what it writes, goes on with, and refuses."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers.shard_sets import make
from helpers.trees import ROOT, write_tree

from tools import make_shards

COMMAND = (sys.executable, "-m", "tools.make_shards")


def call(*arguments: object) -> subprocess.CompletedProcess:
    words = map(str, (*COMMAND, *arguments))
    return subprocess.run([*words], cwd=ROOT, capture_output=True, text=True, timeout=3000)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs it in this process and returns the line it ends with."""

    def start(source: Path, target: Path, *flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(AssertionError):
            make(monkeypatch, source, target, *flags)
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert len(lines) == 1
        return lines[0]

    return start


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_it_writes(tree, tmp_path, monkeypatch, capsys):
    make(monkeypatch, tree, tmp_path / "data", "-j", 2)
    assert capsys.readouterr().out.splitlines() == [
        f"train: 24 images ({tmp_path}/data/train, 1 shard)",
        f"val: 15 images ({tmp_path}/data/val, 1 shard)",
    ]
    assert sorted(contents(tmp_path / "data")) == [
        "classes.txt",
        "train/shard-index.npz",
        "train/train-00000.tar",
        "val/shard-index.npz",
        "val/val-00000.tar",
    ]
    assert (tmp_path / "data" / "classes.txt").read_text() == "a\nb\nc\n"

    # As the webdataset package groups it: members of a key behind one another, the ending from the
    # first dot on, images of all classes mixed.
    with tarfile.open(tmp_path / "data" / "train" / "train-00000.tar") as tar:
        names = tar.getnames()
        for image, label in zip(names[::2], names[1::2], strict=True):
            assert (image.split(".")[0], label.split(".")[1]) == (label.split(".")[0], "cls")
            assert tar.extractfile(label).read() == str("abc".index(image[0])).encode()
            assert tar.extractfile(image).read() == (tree / "train" / image).read_bytes()
    assert names != sorted(names)


def test_shards_are_filled_up_to_a_size():
    sizes = make_shards.np.array([4, 4, 4, 9, 30, 1, 1])
    plan = list(make_shards.plan_shards(sizes, 10))
    assert sorted(i for shard in plan for i in shard) == list(range(7))
    assert all(sizes[shard].sum() <= 10 or len(shard) == 1 for shard in plan)
    assert all(len(shard) for shard in plan)


def test_a_second_time_nothing_is_written(tree, tmp_path, monkeypatch):
    data = make(monkeypatch, tree, tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    make(monkeypatch, tree, data)
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before


@pytest.mark.faults
def test_killed_it_goes_on(tmp_path):
    """kill -9 when the first shards are there; the end is the same as without."""
    source = write_tree(tmp_path / "source", train=120, val=2)
    assert call(source, tmp_path / "whole", "--shard-mb", 1).returncode == 0
    running = subprocess.Popen(
        [*COMMAND, source, tmp_path / "data", "--shard-mb", "1", "-j", "1"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list((tmp_path / "data" / "train").glob("*.tar")):
        assert running.poll() is None
        time.sleep(0.001)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    (tmp_path / "data" / "train" / ".train-00001.tar.tmp-1").write_bytes(b"half")
    done = call(source, tmp_path / "data", "--shard-mb", 1)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_what_it_refuses(tree, tmp_path, monkeypatch, refused):
    data = make(monkeypatch, tree, tmp_path / "data")
    other = write_tree(tmp_path / "other", train=9)
    whole = contents(data)
    assert refused(other, data).startswith(f"error: {data}/train: holds shards of other images")
    assert refused(write_tree(tmp_path / "ab", classes="ab"), data).endswith(
        "classes.txt: holds other classes than SRC; give a new DST"
    )
    assert contents(data) == whole
    assert "lies in SRC; give a DST outside it" in refused(tree, tree / "shards")
    before = contents(other)
    assert f"{other}/train: holds a; give a new DST" in refused(tree, other)
    assert contents(other) == before
    assert "gone" in refused(tmp_path / "gone", tmp_path / "new")

    os.mkfifo(other / "train" / "a" / "pipe.png")
    assert refused(other, tmp_path / "new").endswith(
        "other/train/a/pipe.png: not a regular file; mend or remove the file"
    )
    (other / "train" / "a" / "pipe.png").unlink()
    (other / "train" / "a" / "link.png").symlink_to("nowhere")
    assert "link.png: No such file or directory; mend" in refused(other, tmp_path / "new")


def test_two_images_that_would_have_one_key_are_refused(tmp_path, refused):
    source = write_tree(tmp_path / "source", train=1, val=1)
    for one, other in (("005.jpg", "005.png"), ("x.JPG", "x.jpg"), ("1.B.png", "1.b.png")):
        for name in (one, other):
            shutil.copy(source / "train" / "b" / "0.png", source / "val" / "b" / name)
        line = refused(source, tmp_path / "data")
        assert line.startswith(f"error: {source}/val: b/{one} and b/{other} would have one key in ")
        assert not (tmp_path / "data").exists()
        (source / "val" / "b" / other).unlink()


def test_names_that_webdataset_cuts_otherwise_are_counted(tmp_path, monkeypatch, capsys):
    source = write_tree(tmp_path / "source", train=1, val=1)
    (source / "train" / "a" / "0.png").rename(source / "train" / "a" / "1.2.png")
    make(monkeypatch, source, tmp_path / "data")
    assert "! 1 names with a second dot, which the webdataset package" in capsys.readouterr().out

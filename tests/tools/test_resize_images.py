"""Reduced copies of image folders."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.resize_images import main
from utils.data.image_folder import scan
from utils.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.resize_images", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """In this process: a fresh one would spend seconds on importing torch."""
    monkeypatch.setattr(sys, "argv", ["resize_dataset", *map(str, arguments)])
    return main()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    chance = np.random.default_rng(0)
    for name, shape in (
        ("train/a/wide.jpg", (60, 100)),
        ("train/b/tall.png", (90, 45)),
        ("val/a/small.jpg", (20, 30)),
        ("val/a/square.png", (40, 40)),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(chance.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        coarse.resize(shape[::-1], Image.Resampling.BICUBIC).save(path)
    return folder


def test_copies_reduces_and_goes_on(source: Path, tmp_path: Path, monkeypatch):
    target = tmp_path / "dst"
    (source / "val/a/broken.jpg").write_bytes(b"no image")
    done = run(source, target, "--size", 40, "-j", 2)
    assert done.returncode == 1  # one image is broken
    assert "left out" in done.stderr
    assert "broken.jpg: not an image" in done.stderr
    assert "4 images in" in done.stdout
    sizes = {p.relative_to(target).as_posix(): Image.open(p).size for p in target.rglob("*.*g")}
    assert sizes == {
        "train/a/wide.jpg": (67, 40),
        "train/b/tall.png": (40, 80),
        "val/a/small.jpg": (30, 20),
        "val/a/square.png": (40, 40),
    }
    for name in ("small.jpg", "square.png"):  # small enough: not encoded once more
        assert (target / "val/a" / name).read_bytes() == (source / "val/a" / name).read_bytes()
    before = np.asarray(Image.open(source / "train/a/wide.jpg").resize((67, 40)), dtype=float)
    after = np.asarray(Image.open(target / "train/a/wide.jpg"), dtype=float)
    assert np.abs(before - after).mean() < 4

    # What stands there is kept; what is missing is written.
    (target / "train/a/wide.jpg").unlink()
    mark = os.stat(target / "train/b/tall.png").st_mtime_ns
    (source / "val/a/broken.jpg").unlink()
    assert call(monkeypatch, source, target, "--size", 40) == 0
    assert Image.open(target / "train/a/wide.jpg").size == (67, 40)
    assert os.stat(target / "train/b/tall.png").st_mtime_ns == mark
    assert not list(target.rglob(".*"))  # no temporary file is left


def test_linked_folders_are_copied_as_training_reads_them(source, tmp_path, monkeypatch):
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    for name in "ab":
        (linked / "train" / name).symlink_to(source / "train" / name)
    assert call(monkeypatch, linked, tmp_path / "dst", "--size", 40, "-j", 1) == 0
    folders = [scan(str(root / "train")) for root in (linked, tmp_path / "dst")]
    assert folders[0].paths.tolist() == folders[1].paths.tolist() == [b"a/wide.jpg", b"b/tall.png"]
    (source / "train" / "b" / "again").symlink_to(source / "train")
    with pytest.raises(UserError, match="leads back to a folder above it"):
        call(monkeypatch, source, tmp_path / "other")


def test_what_a_killed_run_left_half_written_goes(source: Path, tmp_path: Path, monkeypatch):
    target = tmp_path / "dst"
    assert call(monkeypatch, source, target, "--size", 40, "-j", 1) == 0
    whole = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    (target / "train" / "a" / ".wide.jpg.tmp-7").write_bytes(b"half")
    (target / "val" / "a" / "small.jpg").unlink()
    assert call(monkeypatch, source, target, "--size", 40, "-j", 1) == 0
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == whole


def test_refuses_in_one_line(source: Path, tmp_path: Path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    a_file = source / "val/a/small.jpg"
    assert call(monkeypatch, source, tmp_path / "small", "--size", 20, "-j", 1) == 0
    before = sorted(source.rglob("*"))
    for arguments, words in (
        ((tmp_path / "none", tmp_path / "dst"), "no such folder"),
        ((source, source / "small"), "lies in SRC"),
        ((empty, tmp_path / "dst"), "holds no images"),
        ((tmp_path / "small", source), "holds train already; give a new DST"),
        ((source, tmp_path / "small", "--size", 40), "was made with --size 20 --quality 92; give "),
        ((source, tmp_path / "small", "--size", 20, "--quality", 80), "was made with --size 20 "),
        ((tmp_path / "small", a_file), "small.jpg: File exists; give another DST"),
        ((tmp_path / "small", a_file / "dst"), "small.jpg/dst: Not a directory; give another DST"),
    ):
        with pytest.raises(UserError, match=words):
            call(monkeypatch, *arguments)
    assert sorted(source.rglob("*")) == before
    with pytest.raises(SystemExit):
        call(monkeypatch, source, tmp_path / "dst", "--quality", 500)

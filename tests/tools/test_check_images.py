"""python -m tools.check_images: every broken file, and no other."""

import csv
import io
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers.coco_trees import annotation
from helpers.coco_trees import write_tree as write_coco_tree
from PIL import Image

from tools import check_images
from tools.check_images import find_broken, find_images
from utils.system import faults
from utils.system.errors import UserError


@pytest.fixture
def data(tree, tmp_path) -> Path:
    """A tree with four broken images and some files beside them."""
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    (data / "train" / "a" / "1.png").write_bytes(b"")
    (data / "train" / "b" / "2.jpg").write_text("<html>not found</html>")
    (data / "val" / "c" / "0.png").write_bytes((data / "val" / "c" / "0.png").read_bytes()[:90])
    os.mkfifo(data / "val" / "c" / "pipe.jpg")
    (data / "train" / "a" / "notes.txt").touch()
    (data / "train" / "a" / ".1.png").touch()
    return data


BROKEN = ("train/a/1.png", "train/b/2.jpg", "val/c/0.png", "val/c/pipe.jpg")


@pytest.fixture
def call(monkeypatch, capfd):
    monkeypatch.setattr(faults, "end_children", lambda: True)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_data", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            faults.run_script(check_images.main)
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return start


@pytest.mark.parametrize(("processes", "decoder"), [(1, "simplejpeg"), (2, "pil")])
def test_broken_files_are_listed_as_csv(call, data, processes, decoder):
    code, out, err = call(data, "-j", processes, "--decoder", decoder)
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in rows] == [f"{data}/{name}" for name in BROKEN]
    assert rows[0]["reason"] == "the file is empty"
    assert rows[3]["reason"] == "not a regular file"
    assert all(row["reason"] for row in rows)
    assert err == "41 images read, 4 broken; passed over: 1 .txt\n"


def test_a_bad_sector_is_listed_and_the_rest_read(call, data, bad_sector):
    bad_sector(b"train/c/3.png")
    code, out, _ = call(data, "-j", 1)
    rows = {row["path"]: row["reason"] for row in csv.DictReader(io.StringIO(out))}
    assert code == 1
    assert list(rows) == [f"{data}/{name}" for name in sorted((*BROKEN, "train/c/3.png"))]
    assert rows[f"{data}/train/c/3.png"].startswith("Input/output error; see to the storage")


def test_a_good_folder(call, tree, tmp_path):
    code, out, err = call(tree, "-j", 1, "--output", tmp_path / "bad.csv")
    assert (code, out) == (0, "")
    assert (tmp_path / "bad.csv").read_text() == "path,reason\n"
    assert err == "39 images read, 0 broken\n"
    code, out, err = call(tree, "-j", 1, "--output", tmp_path / "bad.csv")
    assert (code, out) == (2, "")
    assert "exists already" in err


def test_every_wrong_size_of_a_coco_tree_is_found_at_once(call, tmp_path):
    root = write_coco_tree(tmp_path / "coco", [annotation()], images=4)
    turned = [root / "val2017" / f"picture-{n}.png" for n in (1, 3)]
    for path in turned:
        Image.new("RGB", (48, 64)).save(path)
    (root / "val2017" / "picture-2.png").unlink()
    code, out, err = call(root, "-j", 1)
    assert code == 1
    assert list(csv.reader(out.splitlines())) == [
        ["path", "reason"],
        *([str(path), "48x64 pixels, but 64x48 in the annotations"] for path in turned),
        [str(root / "val2017" / "picture-2.png"), "missing, but in the annotations"],
    ]
    assert "3 images read, 3 broken" in err


def test_names_and_links(tmp_path):
    root = os.fsencode(tmp_path)
    os.makedirs(root + b"/caf\xe9/deep")
    for name in (b"/caf\xe9/\xff.jpg", b"/caf\xe9/deep/2.PNG", b"/1.webp"):
        open(root + name, "wb").close()
    os.symlink(root, root + b"/caf\xe9/deep/loop")
    os.makedirs(root + b"/.hidden")
    open(root + b"/.hidden/3.jpg", "wb").close()
    found, others = find_images(str(tmp_path))
    assert found == [root + n for n in (b"/1.webp", b"/caf\xe9/deep/2.PNG", b"/caf\xe9/\xff.jpg")]
    assert others == {}
    for error in find_broken(found, "pil", 1):
        str(error).encode("utf-8")


def kill_this_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_reader_is_one_line(monkeypatch, data):
    paths, _ = find_images(str(data))
    monkeypatch.setattr(check_images, "read_image", kill_this_process)
    with pytest.raises(UserError, match=r"was killed.*-j"):
        list(find_broken(paths, "pil", 2))


def test_an_image_that_its_exif_turns_is_told_as_such(call, tmp_path):
    """Annotators that leave EXIF out write the sides as they are stored."""
    root = write_coco_tree(tmp_path / "coco", [annotation()], images=2)
    path = root / "val2017" / "picture-1.png"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    code, out, _ = call(root)
    assert code == 1
    (row,) = list(csv.reader(out.splitlines()))[1:]
    assert row == [
        str(path),
        "48x64 pixels, but 64x48 in the annotations: its EXIF orientation turns it, which the "
        "annotations leave out",
    ]


def test_wrong_entries_of_annotations_are_listed(call, tmp_path):
    root = write_coco_tree(tmp_path / "coco", [annotation(1, image_id=9), annotation(2)])
    code, out, _ = call(root)
    assert code == 1
    where = root / "annotations" / "instances_val2017.json"
    assert list(csv.reader(out.splitlines()))[1:] == [
        [str(where), "annotation 1: unknown image_id 9"]
    ]

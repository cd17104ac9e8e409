"""python -m tools.check_images: every broken file, and no other."""

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.coco_trees import annotation
from helpers.coco_trees import write_tree as write_coco_tree
from PIL import Image

from tools import check_images
from tools.check_images import find_broken, find_images
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
def check(call):
    """Runs the tool: (exit code, the rows of its table, lines on stderr)."""

    def start(*arguments):
        code, out, err = call(*arguments, entry=check_images.main)
        return code, list(csv.reader(out)), err

    return start


@pytest.mark.parametrize(("processes", "decoder"), [(1, "simplejpeg"), (2, "pil")])
def test_broken_files_are_listed_as_csv(check, data, processes, decoder):
    code, (head, *rows), err = check(data, "-j", processes, "--decoder", decoder)
    assert (code, head) == (1, ["path", "reason"])
    assert [path for path, _ in rows] == [f"{data}/{name}" for name in BROKEN]
    assert all(reason for _, reason in rows)
    assert (rows[0][1], rows[3][1]) == ("the file is empty", "not a regular file")
    assert err == ["41 images read, 4 broken; passed over: 1 .txt"]


def test_a_bad_sector_is_listed_and_the_rest_read(check, data, bad_sector):
    bad_sector(b"train/c/3.png")
    code, (_, *rows), _ = check(data, "-j", 1)
    assert code == 1
    assert [p for p, _ in rows] == [f"{data}/{n}" for n in sorted((*BROKEN, "train/c/3.png"))]
    assert dict(rows)[f"{data}/train/c/3.png"].startswith("Input/output error; see to the storage")


def test_a_good_folder(check, tree, tmp_path):
    flags = ("-j", 1, "--output", tmp_path / "bad.csv")
    assert check(tree, *flags) == (0, [], ["39 images read, 0 broken"])
    assert (tmp_path / "bad.csv").read_text() == "path,reason\n"
    code, out, err = check(tree, *flags)
    assert (code, out, len(err)) == (2, [], 1)
    assert "exists already" in err[0]


def test_every_wrong_size_of_a_coco_tree_is_found_at_once(check, tmp_path):
    """Annotators that leave EXIF out write the sides as they are stored."""
    root = write_coco_tree(tmp_path / "coco", [annotation()], images=4)
    turned, missing, exif_turned, _ = sorted((root / "val2017").iterdir())
    Image.new("RGB", (48, 64)).save(turned)
    missing.unlink()
    with Image.open(exif_turned) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(exif_turned, exif=exif)
    code, (_, *rows), err = check(root, "-j", 1)
    assert code == 1
    sizes = "48x64 pixels, but 64x48 in the annotations"
    by_exif = f"{sizes}: its EXIF orientation turns it, which the annotations leave out"
    assert rows == [
        [str(turned), sizes],
        [str(exif_turned), by_exif],
        [str(missing), "missing, but in the annotations"],
    ]
    assert "3 images read, 3 broken" in err[0]


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


def test_wrong_entries_of_annotations_are_listed(check, tmp_path):
    root = write_coco_tree(tmp_path / "coco", [annotation(1, image_id=9), annotation(2)])
    code, (_, *rows), _ = check(root)
    where = root / "annotations" / "instances_val2017.json"
    assert (code, rows) == (1, [[str(where), "annotation 1: unknown image_id 9"]])

"""Class folders and their labels."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from utils.data.image_folder import describe, list_classes, scan
from utils.data.shards import open_split
from utils.system.errors import UserError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_labels_follow_names_not_positions(tmp_path):
    make(tmp_path, "train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg")
    make(tmp_path, "val/bee/1.jpg", "val/cat/1.jpg", "val/cat/2.jpg")
    train, val = open_split(str(tmp_path))
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [1, 2, 2]  # by position they would be 0, 1, 1
    assert val.empty_classes() == ["ant"]
    assert any("no val image for 1 class (ant)" in line for line in describe(val, "val"))


def test_a_val_class_that_train_lacks_is_refused(tmp_path):
    make(tmp_path, "train/ant/1.jpg", "val/ant/1.jpg", "val/wasp/1.jpg")
    with pytest.raises(UserError, match=r"wasp.* not among the 1 known classes"):
        open_split(str(tmp_path))


def test_what_is_passed_over_is_counted(tmp_path):
    names = "a/1.JPG a/deep/er/2.png a/.hidden.jpg a/notes.txt a/x.txt a/README .cache/3.jpg"
    make(tmp_path, *names.split(), "b/4.webp", "c/.keep", "stray.jpg")
    folder = scan(str(tmp_path))
    assert [os.fsdecode(p) for p in folder.paths] == ["a/1.JPG", "a/deep/er/2.png", "b/4.webp"]
    assert folder.ignored == {".txt": 2, "no ending": 1}
    assert folder.hidden == 3
    assert folder.empty_classes() == ["c"]
    text = "\n".join(describe(folder, "train"))
    assert "3 images in 2 classes" in text
    assert "2 .txt, 1 no ending" in text


def test_links(tmp_path):
    make(tmp_path, "real/1.jpg", "root/a/1.jpg")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "real")
    assert len(scan(str(tmp_path / "root"))) == 2
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    with pytest.raises(UserError, match="link that leads back"):
        scan(str(tmp_path / "root"))


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        scan(str(tmp_path / "none"))
    make(tmp_path, "data/trian/a/1.jpg")
    with pytest.raises(UserError, match="did you mean trian"):
        open_split(str(tmp_path / "data"))
    (tmp_path / "flat").mkdir()
    with pytest.raises(UserError, match=r"train: no such folder; DATA holds train/ and val/"):
        open_split(str(tmp_path / "flat"))
    with pytest.raises(UserError, match="no class folders"):
        list_classes(str(tmp_path / "flat"))
    make(tmp_path, "empty/a/x.txt")
    with pytest.raises(UserError, match=r"no image in 1 class folders \(1 .txt passed over\)"):
        scan(str(tmp_path / "empty"))


def test_names_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path) + b"/d"
    os.makedirs(root + b"/caf\xe9")
    open(root + b"/caf\xe9/\xff.jpg", "wb").close()
    folder = scan(os.fsdecode(root))
    assert os.path.exists(folder.path(0))
    "\n".join(describe(folder, "train")).encode("utf-8")


def test_the_classes_of_a_checkpoint_rule(tmp_path):
    make(tmp_path, "val/b/1.jpg")
    _, val = open_split(str(tmp_path), ["z", "b"], with_train=False)
    assert val.labels.tolist() == [1]
    with pytest.raises(UserError, match=r"val: 1 class \(b\) not among the 2 known classes"):
        open_split(str(tmp_path), ["y", "z"], with_train=False)


def test_files_come_in_one_order_whatever_the_disk_says(tmp_path, monkeypatch):
    make(tmp_path, "b/2.JPG", "b/10.png", "b/sub/1.webp", "a/z.jpeg")
    listed = [scan(str(tmp_path)).paths.tolist()]
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(real(path), key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    listed.append(scan(str(tmp_path)).paths.tolist())
    assert listed == [[b"a/z.jpeg", b"b/10.png", b"b/2.JPG", b"b/sub/1.webp"]] * 2


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="Permission denied; check its permissions"):
        scan(str(tmp_path))


def said(folder: Path, title: str = "train") -> str:
    return "\n".join(describe(scan(str(folder)), title))


def test_nested_folders_are_said_with_the_classes_in_them(tmp_path):
    make(tmp_path, "train/train/cat/1.jpg", "train/train/dog/1.jpg")
    text = said(tmp_path / "train")
    assert "2 images in 1 class " in text
    assert "  ! one class alone" in text
    assert (
        f"! the folders in {tmp_path}/train/train look like classes: 2 classes (cat, dog)" in text
    )
    make(tmp_path, "train/other/1.jpg")
    assert "!" not in said(tmp_path / "train")  # a class may hold folders


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "lost+found", ".cache"])
def test_folders_of_systems_are_no_classes_and_no_images(tmp_path, name):
    make(tmp_path, "a/1.jpg", "b/1.jpg", f"{name}/1.jpg", f"a/{name}/thumbnail.jpg")
    folder = scan(str(tmp_path))
    assert folder.classes == ("a", "b")
    assert len(folder) == 2
    assert folder.hidden == 2
    from tools.check_images import find_images as checked
    from utils.inspection.predictions import find_images as named

    assert len(named([str(tmp_path)])) == len(checked(str(tmp_path))[0]) == 2


def test_images_in_no_class_folder_are_said(tmp_path):
    make(tmp_path, "a/1.jpg", "b/1.jpg", "stray.png", "other.JPG", "notes.txt")
    assert "! passed over: 2 images directly in" in said(tmp_path)
    assert "(other.JPG), in no class folder" in said(tmp_path)


@pytest.mark.parametrize("there", ["validation", "Val", "dev"])
def test_another_name_of_val_is_named_in_the_refusal(tmp_path, there):
    make(tmp_path, "train/a/1.jpg", f"{there}/a/1.jpg")
    with pytest.raises(UserError) as caught:
        open_split(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/val: no such folder; there is {there}: rename it to val"
    )


def test_a_split_takes_a_share_of_each_class_by_name(tmp_path):
    make(tmp_path, *(f"ant/{i}.jpg" for i in range(10)), *(f"bee/{i}.jpg" for i in range(7)))
    train, val = open_split(str(tmp_path), val_split=0.3)
    assert train.classes == val.classes == ("ant", "bee")
    assert [np.bincount(part.labels).tolist() for part in (train, val)] == [[7, 5], [3, 2]]
    assert sorted([*train.paths, *val.paths]) == scan(str(tmp_path)).paths.tolist()
    hashes = {path: hashlib.sha256(path).digest() for path in scan(str(tmp_path)).paths.tolist()}
    for label, own in ((0, b"ant"), (1, b"bee")):
        chosen = sorted((p for p in hashes if p.startswith(own)), key=hashes.__getitem__)
        assert {*val.paths[val.labels == label]} == {*chosen[: 3 - label]}
    assert describe(val, "val") == [
        f"val: 5 images in 2 classes ({tmp_path}, --val-split 0.3: 30% of each class, by name)"
    ]
    # One image more moves at most one other over the border.
    make(tmp_path, "ant/new.jpg")
    assert len({*val.paths} - {*open_split(str(tmp_path), val_split=0.3)[1].paths}) <= 1


@pytest.mark.parametrize(("share", "lacking"), [(0.1, "bee"), (0.9, "bee"), (0.01, "ant, bee")])
def test_a_split_without_an_image_of_a_class_is_refused_by_name(tmp_path, share, lacking):
    make(tmp_path, *(f"ant/{i}.jpg" for i in range(10)), *(f"bee/{i}.jpg" for i in range(3)))
    with pytest.raises(UserError, match=rf"--val-split {share:g} leaves no image .*\({lacking}\)"):
        open_split(str(tmp_path), val_split=share)


def test_a_folder_with_train_and_val_is_not_split(tmp_path):
    make(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    with pytest.raises(UserError, match=r"has train/, and --val-split 0.5 is for class folders"):
        open_split(str(tmp_path), val_split=0.5)

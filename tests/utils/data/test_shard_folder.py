"""Tar shards are read as the class folders they were made from: same images, order and run."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers.kill_driver import same, state
from helpers.shard_sets import make, write_tar
from helpers.trees import write_tree

from tests.faults.test_kill_and_resume import FLAGS, kill_and_resume
from tools.check_images import find_broken, find_images
from utils.data import remote_files, shard_folder, shard_index
from utils.data.image_folder import describe
from utils.data.loading import ImageDataset, eval_transform
from utils.data.splits import open_images, open_split
from utils.data.user_images import read_batches
from utils.system.errors import UserError


@pytest.fixture(scope="module")
def sharded(tree, tmp_path_factory):
    """The tree's images in shards. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        return make(patch, tree, tmp_path_factory.mktemp("sharded") / "data", "-j", 1)


def assert_same_images(folder, in_shards):
    assert in_shards.classes == folder.classes
    np.testing.assert_array_equal(in_shards.labels, folder.labels)
    np.testing.assert_array_equal(in_shards.paths, folder.paths)
    for index in range(len(folder)):
        with open(folder.path(index), "rb") as file:
            assert in_shards.path(index).read() == file.read()


@pytest.mark.parametrize("shard_mb", [1, 256])
def test_the_images_of_the_folder_in_its_order(tree, tmp_path, monkeypatch, shard_mb):
    monkeypatch.setattr("tools.make_shards.plan_shards", small_shards(shard_mb))
    data = make(monkeypatch, tree, tmp_path / "data", "--shard-mb", shard_mb, "-j", 1)
    for folder, in_shards in zip(open_split(str(tree)), open_split(str(data)), strict=True):
        assert_same_images(folder, in_shards)
        assert describe(in_shards, "x")[0].endswith(f"({in_shards.where})")
    assert len(in_shards.shards) == (1 if shard_mb == 256 else 8)


def small_shards(shard_mb: int):
    """The plan with a thousandth of the size: the tests' images have 4 kB."""
    from tools.make_shards import plan_shards

    return lambda sizes, most: plan_shards(sizes, most // 100 if shard_mb == 1 else most)


def test_odd_names(tmp_path, monkeypatch):
    """Sub-folders, capitals, second dots, two endings of one key, classes that sort otherwise as
    paths, names that are not UTF-8 or longer than a tar header's field."""
    source = write_tree(tmp_path / "source", train=2, val=1)
    image = (source / "train" / "a" / "0.png").read_bytes()
    names = [
        "a/x.JPG",
        "a/x.png",
        "a/deep/er/y.jpeg",
        "a/2020.01.02.jpg",
        "a-b/1.png",
        f"a/{'long' * 40}.png",
        "ß/1.png",
    ]
    for name in map(os.fsencode, [*names, os.fsdecode(b"a/\xff.png")]):
        place = os.path.join(os.fsencode(source), b"train", name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(image)
    data = make(monkeypatch, source, tmp_path / "data")
    for folder, in_shards in zip(open_split(str(source)), open_split(str(data)), strict=True):
        assert_same_images(folder, in_shards)

    opened = open_images(f"{data}/train")
    odd = opened.path(opened.paths.tolist().index(b"a/\xff.png"))
    shard = tmp_path / "data" / "train" / "train-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"train-00000\.tar:a/\\xff\.png: the shard has changed"):
        odd.read()


def test_labels_go_by_name_whatever_the_numbers(tree, tmp_path):
    """Shards from elsewhere: keys without folders, numbers in another order than the names, other
    members beside the images."""
    image = (tree / "train" / "a" / "0.png").read_bytes()
    for part, numbers in (("train", (2, 0, 1, 2)), ("val", (1,))):
        members = []
        for key, number in enumerate(numbers):
            members += [
                (f"./{key:04}.png", image),
                (f"./{key:04}.cls", b"%d\n" % number),
                (f"./{key:04}.json", b"{}"),
            ]
        write_tar(tmp_path / part / "shard-0.tar", [*members, ("lost.png", image)])
    (tmp_path / "classes.txt").write_text("zebra\nbee\nant\n")
    train, val = open_split(str(tmp_path))
    assert train.classes == val.classes == ("zebra", "bee", "ant")
    # In the order of class names, then keys: ant 0, ant 3, bee 2, zebra 1.
    assert train.paths.tolist() == [b"0000.png", b"0003.png", b"0002.png", b"0001.png"]
    assert train.labels.tolist() == [2, 2, 1, 0]
    assert describe(train, "train")[1:] == ["  ! passed over: 4 .json, 1 image without .cls"]

    # Labelled by another list of names, as of a checkpoint.
    _, val = open_split(str(tmp_path), ["ant", "bee", "cat"], with_train=False)
    assert val.labels.tolist() == [1]
    with pytest.raises(UserError, match=r"1 class \(bee\) not among the 2 known classes; labels"):
        open_split(str(tmp_path), ["ant", "cat"], with_train=False)

    # Without names.
    (tmp_path / "classes.txt").unlink()
    train, val = open_split(str(tmp_path))
    assert train.classes == val.classes == ("0", "1", "2")
    assert "  ! no classes.txt: classes go by their numbers" in describe(val, "val")
    with pytest.raises(UserError, match=r"1 class \(1\) not among .* known classes; write the"):
        open_split(str(tmp_path), ["ant", "bee", "cat"], with_train=False)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ("ant\nbee\n", r"has the class number 2 .* and classes\.txt has 2 names"),
        ("ant\nbee\nant\n", r"classes\.txt: 1 class \(ant\) twice"),
        ("ant\n\nbee\n", r"classes\.txt: an empty line"),
    ],
)
def test_names_that_do_not_fit(tmp_path, names, fault):
    write_tar(tmp_path / "0.tar", [("0.png", b"x"), ("0.cls", b"2")])
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=fault):
        shard_folder.scan(str(tmp_path))


def test_class_folders_come_before_archives(tree, tmp_path):
    """ImageNet's own archives, one a class, are often left beside what was unpacked from them."""
    data = shutil.copytree(tree, tmp_path / "data")
    write_tar(data / "train" / "a.tar", [("0.JPEG", b"x")])
    train, _ = open_split(str(data))
    assert (len(train), train.where) == (24, str(data / "train"))
    for name in "abc":
        shutil.rmtree(data / "train" / name)
    with pytest.raises(UserError, match=r"no image with its class number .* in 1 tar files"):
        open_split(str(data))


def test_a_run_on_shards_is_the_run_on_the_folder(run, tree, sharded, tmp_path):
    for data, workers, output in ((tree, 0, "folder"), (sharded, 2, "shards")):
        done = run("light_main.py", data, *FLAGS, "-j", workers, "--output", output)
        assert done.returncode == 0, done.stderr
    wanted, found = state(tmp_path / "folder"), state(tmp_path / "shards")
    for part, content in wanted.items():
        assert same(content, found[part]), part


def test_some_of_the_images(tree, sharded):
    chosen = np.array([7, 1, 20])
    assert_same_images(
        open_images(str(tree / "train")).take(chosen),
        open_images(str(sharded / "train")).take(chosen),
    )


@pytest.mark.faults
def test_kills_on_shards(sharded, tmp_path):
    """Resumed with other numbers of workers."""
    lines = kill_and_resume(sharded, tmp_path, 3, "light_main.py", *FLAGS)
    assert [line.rpartition(" ")[2] for line in lines] == ["equal"] * 3


def test_faults_in_shards_end_in_one_line(run, sharded, tmp_path):
    data = shutil.copytree(sharded, tmp_path / "data")
    place = data / "train" / "train-00000.tar"
    whole = place.read_bytes()
    train = open_images(str(data / "train"))
    flags = ("-a", "mobilenetv2", "--img-size", 32, "-b", 6, "--epochs", 1, "--skip-bad-images")

    # An image that is broken: as in folders, the next one takes its place and it is listed.
    broken = train.path(5)
    place.write_bytes(
        whole[: broken.offset] + bytes(broken.size) + whole[broken.offset + broken.size :]
    )
    done = run("main.py", *flags, "-j", 1, "data")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-6:-4] == [
        "1 times an image that cannot be read was replaced:",
        "data/train/train-00000.tar:a/5.png",
    ]
    paths, _ = find_images(str(data))
    assert len(paths) == 39
    found = [str(error) for error in find_broken(paths, "torchvision", 2) if error is not None]
    assert found == [f"{place}:a/5.png: not an image"]

    # A shard that cannot be read is no broken image.
    place.unlink()
    remote_files.close_files()
    fault = ImageDataset(train, eval_transform(32, 1.0), skip_broken=True)[0, 5]
    assert isinstance(fault, UserError)
    assert (str(fault), fault.exit_code) == (
        f"{place}: No such file or directory; see to it, and go on with --resume auto",
        1,
    )

    # Other images where the index says they are: nothing is replaced.
    place.write_bytes(whole[512:] + whole[:512])
    for workers in (0, 1):
        batches = read_batches([train.path(0)], 32, 1.0, 1, torch.device("cpu"), workers)
        with pytest.raises(UserError, match=r"a/0\.png: the shard has changed"):
            next(batches)
    done = run("main.py", *flags, "-j", 1, "data")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the shard has changed since its index was made; put it back, or remove" in line
    assert f"data/train/{shard_index.NAME}" in line

    place.write_bytes(whole[:-20000])
    done = run("main.py", *flags, "data")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "data/train/train-00000.tar: damaged or cut short (" in line

"""Tar shards are read as the class folders they were made from, pairs as webdataset has them."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from helpers.kill_driver import same, state
from helpers.shard_sets import make, write_tar
from helpers.small_runs import SMALL
from helpers.trees import write_tree

from tests.faults.test_kill_and_resume import FLAGS, kill_and_resume
from tools.check_images import find_broken, find_images
from utils.data import shards
from utils.data.image_folder import describe
from utils.data.loader import ImageDataset
from utils.data.shards import NAME, find_index, open_images, open_split
from utils.data.transforms import Preprocessing
from utils.inspection.predictions import read_batches
from utils.system.errors import UserError

PAIR = [("a/0.png", b"image"), ("a/0.cls", b"0")]


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
    """Sub-folders, capitals, second dots, classes that sort otherwise as
    paths, names that are not UTF-8 or longer than a tar header's field."""
    source = write_tree(tmp_path / "source", train=2, val=1)
    image = (source / "train" / "a" / "0.png").read_bytes()
    names = ["a/x.JPG", "a/deep/er/y.jpeg", "a/2020.01.02.jpg", "a-b/1.png", "ß/1.png"]
    for name in map(os.fsencode, [*names, f"a/{'long' * 40}.png", os.fsdecode(b"a/\xff.png")]):
        place = os.path.join(os.fsencode(source), b"train", name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(image)
    data = make(monkeypatch, source, tmp_path / "data")
    for folder, in_shards in zip(open_split(str(source)), open_split(str(data)), strict=True):
        assert_same_images(folder, in_shards)


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
        shards.scan(str(tmp_path))


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


def test_a_run_on_shards_is_the_run_on_the_folder(call, thin, tree, sharded, tmp_path):
    for data, workers, output in ((tree, 0, "folder"), (sharded, 2, "shards")):
        code, _, err = call(data, *SMALL, "--epochs", 1, "-j", workers, "--output", output)
        assert code == 0, err
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


@pytest.mark.slow
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
    found = [str(error) for error in find_broken(paths, "simplejpeg", 2) if error is not None]
    assert found == [f"{place}:a/5.png: not an image"]

    # A shard that cannot be read is no broken image.
    place.unlink()
    shards._opened.cache_clear()
    fault = ImageDataset(train, Preprocessing(32, 1.0), skip_broken=True)[0, 5]
    assert isinstance(fault, UserError)
    assert (str(fault), fault.exit_code) == (
        f"{place}: No such file or directory; see to it, and go on with --resume auto",
        1,
    )

    # Other images where the index says they are: nothing is replaced.
    place.write_bytes(whole[512:] + whole[:512])
    for workers in (0, 1):
        batches = read_batches(
            [train.path(0)], Preprocessing(32, 1.0), 1, torch.device("cpu"), workers
        )
        with pytest.raises(UserError, match=r"a/0\.png: the shard has changed"):
            next(batches)
    done = run("main.py", *flags, "-j", 1, "data")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the shard has changed since its index was made, or the server ignores" in line
    assert f"data/train/{NAME}" in line

    place.write_bytes(whole[:-20000])
    done = run("main.py", *flags, "data")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"data/train/{NAME}: train-00000.tar is missing, new, or of another size" in line


@pytest.fixture
def folder(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", PAIR)
    write_tar(tmp_path / "shards" / "1.tar", [("b/0.jpg", b"other image"), ("b/0.cls", b"3")])
    return tmp_path / "shards"


@pytest.fixture
def made(monkeypatch):
    """Counts how often an index is made."""
    calls, make_index = [], shards.make_index

    def counted(*arguments):
        calls.append(arguments)
        return make_index(*arguments)

    monkeypatch.setattr(shards, "make_index", counted)
    return calls


def test_it_is_stored_beside_the_shards(folder, made):
    first = find_index(str(folder))
    os.utime(folder / "1.tar", (0, 0))  # a copy has another time, and is the same
    assert find_index(str(folder)).names.tolist() == first.names.tolist()
    assert len(made) == 1


def test_an_index_of_other_shards_is_refused_by_name(folder):
    find_index(str(folder))
    line = rf"^{folder}/{NAME}: {{}} is missing, new, or of another size than when .*; copy that"
    whole = (folder / "1.tar").read_bytes()
    write_tar(folder / "2.tar", [*PAIR, ("c/0.png", bytes(20_000)), ("c/0.cls", b"1")])
    with pytest.raises(UserError, match=line.format(r"2\.tar")):
        find_index(str(folder))
    (folder / "2.tar").unlink()
    find_index(str(folder))
    (folder / "1.tar").write_bytes(whole + bytes(512))
    with pytest.raises(UserError, match=line.format(r"1\.tar")):
        find_index(str(folder))
    (folder / NAME).unlink()
    assert find_index(str(folder)).labels.tolist() == [0, 3]


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_index_is_refused_by_name(folder, damage):
    whole = find_index(str(folder)).to_bytes()
    (folder / NAME).write_bytes(damage(whole))
    with pytest.raises(UserError, match=rf"^{folder}/{NAME}: damaged, cut short, or of another"):
        find_index(str(folder))
    assert (folder / NAME).read_bytes() == damage(whole)


def test_an_index_of_another_version_is_refused_by_name(folder, monkeypatch):
    """Version 1 had paired images and classes otherwise."""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "VERSION", 1)
        find_index(str(folder))
    with pytest.raises(UserError, match=rf"^{folder}/{NAME}: .* another version; remove it"):
        find_index(str(folder))


def test_a_folder_that_cannot_be_written(folder, made, monkeypatch):
    def refuse(path, data):
        raise UserError("read-only")

    monkeypatch.setattr(shards, "write_atomically", refuse)
    for _ in range(2):
        assert len(find_index(str(folder)).names) == 2
    assert len(made) == 2
    assert not (folder / NAME).exists()


def test_no_shards_no_index(tmp_path):
    assert find_index(str(tmp_path)) is None
    assert find_index(str(tmp_path / "gone")) is None


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
    [b"cat", b"-1", b"", b"1.5", b"%d" % 2**63, b"1000000", b"1" + b" " * 600],
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
        "link or sparse": 1,
    }


def read_as_webdataset(path) -> list[tuple[bytes, int]] | None:
    """(image, class) of each sample that the webdataset package makes of a shard.

    None where it refuses the shard, or a sample has two images of one class.
    """
    try:
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    except ValueError as error:
        if "duplicate file name" in str(error):
            return None
        raise
    if any({"jpg", "png", "cls"} <= sample.keys() for sample in samples):
        return None
    images = [(s.get("jpg") or s.get("png"), s.get("cls")) for s in samples]
    return [(image, int(label)) for image, label in images if image and label]


def read_here(path) -> list[tuple[bytes, int]]:
    index, data = find_index(str(path.parent)), path.read_bytes()
    spans = index.members[["offset", "size"]].tolist()
    images = [data[offset : offset + size] for offset, size in spans]
    return list(zip(images, index.labels.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_members_is_paired_as_webdataset_does(tmp_path, seed):
    """Or refused, where webdataset refuses it, or gives two images one class."""
    chance = np.random.default_rng(seed)
    members = []
    for _ in range(chance.integers(2, 14)):
        key = chance.choice([*"abcdefghij", "d/a", "d.e/a"])
        ending = chance.choice(["jpg", "PNG", "json"])
        group = [(f"{key}.{ending}", b"image %d" % len(members))]
        if chance.random() < 0.8:
            group.append((f"{key}.{chance.choice(['cls', 'CLS'])}", b"%d" % len(members)))
        members += [group[i] for i in chance.permutation(len(group))]
        if chance.random() < 0.2:
            members.append(("README", b"no key"))
    path = write_tar(tmp_path / "0.tar", [*members, ("z.jpg", b"last"), ("z.cls", b"99")])
    if (pairs := read_as_webdataset(path)) is not None:
        assert read_here(path) == pairs
        return
    with pytest.raises(UserError, match=r"0\.tar: .*(two \..* behind one another|have one key)"):
        find_index(str(tmp_path))


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ([("0.jpg", b"x"), ("0.cls", b"0")] * 2, r"0 has two \.jpg behind one another; .*own"),
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("a.png", b"y"), ("a.cls", b"1")], "a has two .cls"),
        ([("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"1")], "a.jpg and a.png have one key"),
    ],
)
def test_neighbours_of_one_key_that_are_no_pair_are_refused_by_name(tmp_path, members, fault):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=rf"^{tmp_path}/0\.tar: {fault}"):
        find_index(str(tmp_path))
    assert not (tmp_path / NAME).exists()

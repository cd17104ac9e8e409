"""demo:NAME: images written once as class folders, with the pixels of the original files."""

import gzip
import io
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.original_sets import CIFAR10_NAMES, pack_cifar, write_cifar, write_fashion
from PIL import Image
from torchvision import datasets

from utils.data import demo_sets, demo_shapes, shards
from utils.data.demo_sets import FASHION_CLASSES, FASHION_PACKAGE
from utils.system.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_sets, "HOME", tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def read(root, part: str, classes) -> list[tuple[int, np.ndarray]]:
    """(label in `classes`, pixels) of a part's images, in the order of their numbers."""
    files = sorted((root / part).rglob("*.png"), key=lambda file: file.name)
    return [(classes.index(file.parent.name), np.asarray(Image.open(file))) for file in files]


def assert_written(root, made, classes) -> None:
    for part, (pixels, labels) in made.items():
        written = read(root, part, classes)
        assert [label for label, _ in written] == labels.tolist()
        assert np.array_equal([image for _, image in written], pixels)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_fashion_is_written_once(tmp_path, home, monkeypatch, packed, inner):
    made = write_fashion(tmp_path / "files" / inner, monkeypatch, packed=packed)
    root = demo_sets.prepare("demo:fashion", str(tmp_path / "files"))
    assert root.resolve() == home / "fashion"
    assert_written(root, made, FASHION_CLASSES)
    train, val = shards.open_split(str(root))
    assert (len(train), len(val), len(train.classes)) == (20, 10, 10)
    (tmp_path / "files").rename(tmp_path / "gone")
    assert demo_sets.prepare("demo:fashion") == root  # from now on without the files


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_PACKAGE.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_package_of_the_system_holds_what_was_published():
    root = demo_sets.prepare("demo:fashion")
    for part, count in (("train", 6000), ("val", 1000)):
        assert [len(list((root / part / name).iterdir())) for name in FASHION_CLASSES] == [
            count
        ] * 10


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_written_in_colour(tmp_path, monkeypatch, name, packed):
    made = write_cifar(tmp_path, monkeypatch, name, count=100)
    if packed:
        pack_cifar(tmp_path, monkeypatch, name)
    root = demo_sets.prepare(f"demo:{name.lower()}", str(tmp_path))
    classes = CIFAR10_NAMES if name == "CIFAR10" else [f"class_{i:02d}" for i in range(100)]
    made = {part: (pixels.transpose(0, 2, 3, 1), labels) for part, (pixels, labels) in made.items()}
    assert_written(root, made, classes)


def test_download_fetches_the_published_archive_and_nothing_comes_without_it(tmp_path, monkeypatch):
    made = write_cifar(tmp_path, monkeypatch)
    archive = pack_cifar(tmp_path, monkeypatch)
    fetched = []

    def fetch(url: str, target) -> None:
        fetched.append(url)
        Path(target).write_bytes(archive.read_bytes())

    monkeypatch.setattr(datasets.utils, "_urlretrieve", fetch)
    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(UserError, match="demo:cifar10 --download"):
        demo_sets.prepare("demo:cifar10")
    assert fetched == []
    root = demo_sets.prepare("demo:cifar10", download=True)
    assert fetched == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert len(read(root, "val", CIFAR10_NAMES)) == len(made["val"][1])


def test_a_download_that_fails_is_one_line(monkeypatch):
    def fail(*_, **__) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets.utils, "_urlretrieve", fail)
    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    for name in ("cifar10", "fashion"):
        with pytest.raises(UserError, match=r"^--download: .*--data-files$") as caught:
            demo_sets.prepare(f"demo:{name}", download=True)
        assert "\n" not in str(caught.value)


def test_without_files_both_ways_are_named(tmp_path):
    line = (
        r"demo:fashion .*: no train-images-idx3-ubyte.gz in .*--data-files DIR\), or .*--download\)"
        ".*apt-get install dataset-fashion-mnist"
    )
    with pytest.raises(UserError, match=line):
        demo_sets.prepare("demo:fashion", str(tmp_path))
    for folder in (None, str(tmp_path)):
        with pytest.raises(
            UserError, match=r"demo:cifar10 .*--data-files DIR\), or .*--download\)"
        ):
            demo_sets.prepare("demo:cifar10", folder)


def test_a_changed_file_of_fashion_is_refused(tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    good = file.read_bytes()
    changed = bytearray(gzip.decompress(good))
    changed[-1] ^= 1
    file.write_bytes(gzip.compress(changed))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz: its SHA-256 is another"):
        demo_sets.prepare("demo:fashion", str(tmp_path))
    file.write_bytes(good[:-9])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz: "):
        demo_sets.prepare("demo:fashion", str(tmp_path))


def test_of_a_gzip_bomb_no_more_is_read_than_the_known_size(tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(30_000_000)))
    monkeypatch.setattr(demo_sets, "FASHION_BYTES", 1_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="its SHA-256 is another"):
        demo_sets.prepare("demo:fashion", str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


class Payload:
    """Makes a file when its pickle is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("changed", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize("packed", ["", "the file in it", "the archive"])
def test_a_changed_pickle_is_never_opened(tmp_path, monkeypatch, changed, packed):
    write_cifar(tmp_path, monkeypatch)
    folder, mark = tmp_path / "cifar-10-batches-py", tmp_path / "ran"
    (folder / changed).write_bytes(pickle.dumps(Payload(mark)))
    pickle.load(io.BytesIO((folder / changed).read_bytes()))
    assert mark.exists()  # the payload works where it is opened
    mark.unlink()
    fault = "cifar-10-batches-py: a file is missing or has another MD5"
    if packed:
        pack_cifar(tmp_path, monkeypatch)
    if packed == "the archive":  # another one than was published: not even unpacked
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
        fault = r"cifar-10-python\.tar\.gz: its MD5 is another than the published"
    with pytest.raises(UserError, match=fault):
        demo_sets.prepare("demo:cifar10", str(tmp_path))
    assert not mark.exists()


def test_an_unknown_name_and_a_folder_without_rights(tmp_path, home):
    with pytest.raises(UserError, match="'demo:cifar'; did you mean demo:cifar10"):
        demo_sets.prepare("demo:cifar")
    with pytest.raises(UserError, match="there is demo:digits, demo:fashion, demo:cifar10"):
        demo_sets.prepare("demo:x")
    home.write_text("a file")
    with pytest.raises(UserError, match="home/digits: cannot write there"):
        demo_sets.prepare("demo:digits")


def test_a_run_on_them(call, tmp_path, monkeypatch):
    write_fashion(tmp_path / "files", monkeypatch)
    small = ("-a", "mobilenetv2", "--img-size", 32, "--epochs", 1, "-b", 5, "--seed", 0)
    code, out, err = call("demo:fashion", *small, "--data-files", tmp_path / "files")
    assert code == 0, err
    assert out[0].startswith("train: 20 images in 10 classes"), out
    assert call("demo:fashion", "-e", "--resume", "auto", "-a", "mobilenetv2")[0] == 0

    code, _, err = call(tmp_path, *small, "--download")
    assert (code, err) == (2, [f"error: --download does nothing with {tmp_path}: leave it out"])
    code, _, err = call("demo:cifar100", "--download", "--data-files", "x")
    assert (code, err) == (
        2,
        ["error: --data-files and --download are two ways to the same: give one of them"],
    )


def names(folder) -> dict[str, list[str]]:
    """{"train/0": file names, …}"""
    return {
        f"{part.name}/{label.name}": sorted(file.name for file in label.iterdir())
        for part in folder.iterdir()
        for label in part.iterdir()
    }


def test_the_split_is_stratified_and_fixed(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo_sets, "HOME", tmp_path)
    monkeypatch.setattr(demo_sets, "DIGIT_PIXELS", 1)  # the files are not looked into
    files = names(demo_sets.prepare("demo:digits"))
    counts = {key: len(of_class) for key, of_class in files.items()}
    assert sum(n for key, n in counts.items() if key.startswith("train")) == 1438
    assert sum(n for key, n in counts.items() if key.startswith("val")) == 359
    for label in map(str, range(10)):
        train, val = (files[f"{part}/{label}"] for part in ("train", "val"))
        assert not set(train) & set(val)
        assert len(val) == round(0.2 * (len(train) + len(val)))
    demo_sets.write_digits(tmp_path / "again")
    assert names(tmp_path / "again") == files


def test_without_scikit_learn_the_line_says_what_to_install(tmp_path, monkeypatch):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    monkeypatch.setattr(demo_sets, "HOME", tmp_path)
    with pytest.raises(UserError, match="scikit-learn, which is not installed: pip install -r req"):
        demo_sets.prepare("demo:digits")
    with pytest.raises(UserError, match="scikit-learn, which is not installed: pip install -r req"):
        demo_shapes.write_shapes(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing half made is taken for the data next time


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_a_link_in_the_place_of_the_data_is_not_followed(tmp_path, monkeypatch, name):
    """One that an unpacked folder may hold: nothing is written where it leads."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    (home / name).symlink_to(elsewhere)
    monkeypatch.setattr(demo_sets, "HOME", home)
    for module in (demo_sets, demo_shapes):
        monkeypatch.setattr(module, f"write_{name}", lambda folder: (folder / "x").touch(), False)
    with pytest.raises(UserError, match="cannot write there"):
        demo_sets.prepare("demo:digits") if name == "digits" else demo_shapes.prepare(home)
    assert not elsewhere.exists()
    assert [path.name for path in home.iterdir()] == [name]

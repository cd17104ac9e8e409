"""demo:NAME: photographs written once as class folders, with the pixels of the original files."""

import numpy as np
import pytest
from helpers.original_sets import CIFAR10_NAMES, use_cifar10, write_binary, write_fashion
from PIL import Image

from utils.data import demo_sets, splits
from utils.data.demo_photos import FASHION_CLASSES
from utils.data.original_files import CIFAR10
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


def test_fashion_is_written_once(tmp_path, home, monkeypatch):
    made = write_fashion(tmp_path / "files", monkeypatch)
    root = demo_sets.prepare("demo:fashion", str(tmp_path / "files"))
    assert root.resolve() == home / "fashion"
    for part, (pixels, labels) in made.items():
        found = read(root, part, FASHION_CLASSES)
        assert [label for label, _ in found] == labels.tolist()
        assert np.array_equal([image for _, image in found], pixels)
    train, val = splits.open_split(str(root))
    assert (len(train), len(val), len(train.classes)) == (20, 10, 10)
    (tmp_path / "files").rename(tmp_path / "gone")
    assert demo_sets.prepare("demo:fashion") == root  # from now on without the files


def test_cifar10_is_written_in_colour(tmp_path, monkeypatch):
    kind, made = write_binary(tmp_path / CIFAR10.archive[0], CIFAR10, CIFAR10_NAMES, 10)
    use_cifar10(kind, monkeypatch)
    root = demo_sets.prepare("demo:cifar10", str(tmp_path))
    for part, (pixels, labels) in made.items():
        found = read(root, part, CIFAR10_NAMES)
        assert [label for label, _ in found] == labels.tolist()
        assert np.array_equal([image for _, image in found], pixels.transpose(0, 2, 3, 1))


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, home, monkeypatch):
    names = ("..", *CIFAR10_NAMES[1:])
    kind, _ = write_binary(tmp_path / CIFAR10.archive[0], CIFAR10, names, 10)
    use_cifar10(kind, monkeypatch)
    with pytest.raises(UserError, match="class names"):
        demo_sets.prepare("demo:cifar10", str(tmp_path))
    assert list(home.iterdir()) == []


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

    code, _, err = call("demo:cifar100", *small)
    assert (code, len(err)) == (2, 1)
    assert "demo:cifar100 --data-files DIR" in err[0]
    for data in ("demo:digits", tmp_path):
        code, _, err = call(data, *small, "--download")
        assert (code, err) == (2, [f"error: --download does nothing with {data}: leave it out"])
    code, _, err = call("demo:cifar100", "--download", "--data-files", "x")
    assert (code, err) == (
        2,
        ["error: --data-files and --download are two ways to the same: give one of them"],
    )

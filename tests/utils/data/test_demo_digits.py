"""The demo's digits: one in five of each class to look at, the same ones every time."""

import sys

import pytest

from utils.data import demo_digits, demo_sets
from utils.detection import demo_shapes
from utils.system.errors import UserError


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
    monkeypatch.setattr(demo_digits, "PIXELS", 1)  # the files are not looked into
    files = names(demo_sets.prepare("demo:digits"))
    counts = {key: len(of_class) for key, of_class in files.items()}
    assert sum(n for key, n in counts.items() if key.startswith("train")) == 1438
    assert sum(n for key, n in counts.items() if key.startswith("val")) == 359
    for label in map(str, range(10)):
        train, val = (files[f"{part}/{label}"] for part in ("train", "val"))
        assert not set(train) & set(val)
        assert len(val) == round(0.2 * (len(train) + len(val)))
    demo_digits.write_digits(tmp_path / "again")
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
    with pytest.raises(UserError, match="cannot write there"):
        demo_sets.prepare("demo:digits") if name == "digits" else demo_shapes.prepare(home)
    assert not elsewhere.exists()
    assert [path.name for path in home.iterdir()] == [name]

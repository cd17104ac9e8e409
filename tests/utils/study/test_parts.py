"""The validation part: cut from train/ class by class, the same images every time."""

import pytest

from utils.study.parts import write_parts
from utils.system.errors import UserError


def contents(folder) -> dict[str, set[bytes]]:
    return {c.name: {file.read_bytes() for file in c.iterdir()} for c in sorted(folder.iterdir())}


def test_the_parts_have_no_image_in_common(tree, tmp_path):
    write_parts(tree, tmp_path / "a", 3, 2, seed=0)
    train, val = (contents(tmp_path / "a" / part) for part in ("train", "val"))
    whole = contents(tree / "train")
    for name in whole:
        assert (len(train[name]), len(val[name])) == (3, 2)
        assert not train[name] & val[name]
        assert train[name] | val[name] <= whole[name]
    # All that are left, and the same validation images; another seed draws others.
    write_parts(tree, tmp_path / "b", None, 2, seed=0)
    assert contents(tmp_path / "b" / "val") == val
    assert {n: len(v) for n, v in contents(tmp_path / "b" / "train").items()} == dict.fromkeys(
        whole, 6
    )
    write_parts(tree, tmp_path / "c", 3, 2, seed=1)
    assert contents(tmp_path / "c" / "val") != val


def test_too_few_images(tree, tmp_path):
    with pytest.raises(UserError, match="class a has 8 images, and the plan takes 9"):
        write_parts(tree, tmp_path / "a", 6, 3, seed=0)

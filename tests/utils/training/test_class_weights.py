"""The data of a run: the weights of its classes in the loss, and its name in a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trees import write_tree
from sklearn.utils.class_weight import compute_class_weight

from main import RECIPE
from utils.config.classification import DataSettings
from utils.data.image_folder import ImageFolder
from utils.runs.resume import Start
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.training.classification_data import class_weights, describe_weights, open_training_data


def folder(*counts: int) -> ImageFolder:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple("abcdefgh"[: len(counts)])
    return ImageFolder("data/train", names, np.array([b"x"] * len(labels)), labels)


@pytest.mark.parametrize("counts", [(5,), (1, 1), (7, 2, 40), (100, 1, 3, 50)])
def test_balanced_weights_are_scikit_learn_s(counts):
    images = folder(*counts)
    wanted = compute_class_weight("balanced", classes=np.arange(len(counts)), y=images.labels)
    assert class_weights("balanced", images) == pytest.approx(wanted.tolist(), rel=1e-15)


def test_a_class_without_images_cannot_be_balanced():
    with pytest.raises(UserError, match=r"data/train: no images of b, d, e and 1 more, so --class"):
        class_weights("balanced", folder(3, 0, 2, 0, 0, 0))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.json", '{"b": 2, "a": 0.5, "c": 1e-3}'),
        ("w.csv", "a,0.5\nb, 2\nc,1e-3\n"),
        ("w.csv", '\ufeffclass,weight\r\n\r\nc,0.001\r\nb,2\r\n"a",0.5'),
        ("weights", "name,Weight\nc,0.001\nb,2\na,0.5"),
    ],
)
def test_weights_of_a_file_go_by_name(tmp_path: Path, name, text):
    (tmp_path / name).write_text(text)
    found = class_weights(str(tmp_path / name), folder(4, 4, 4))
    assert found == (0.5, 2.0, 0.001)
    assert describe_weights(found, "abc") == ("class weights of the loss: 0.001 (c) to 2 (b)")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.json", "[1, 2]", "no object of class names and weights; give balanced, or a CSV"),
        ("w.json", "{", "no usable JSON (Expecting property name"),
        ("w.json", '{"a": 1, "b": 1, "a": 2}', "'a' stands there twice"),
        ("w.json", '{"a": 1, "b": 1}', "no weight for c; name every class"),
        ("w.json", '{"a": 1, "b": 1, "c": 0}', "the weight of c, '0', is not a finite number ab"),
        ("w.json", '{"a": 1, "b": 1, "c": NaN}', "the weight of c, 'nan', is not"),
        ("w.json", '{"a": 1, "b": [1], "c": 1}', "the weight of b, '[1]', is not"),
        ("w.json", '{"a": 1, "b": 1, "c": 1, "\\u001b": 1}', "no class \\x1b; data/train has no"),
        ("w.csv", "a,1\nb,1\na,2\nc,1", "class a stands there twice"),
        ("w.csv", "a,1\nb\n", "'b' is not a class name and a weight"),
        ("w.csv", "a,1\nb,x\nc,1\n", "the weight of b, 'x', is not a finite number above 0"),
        ("w.csv", "a,1\nb,1\nC,1\n", "no class C; data/train has no such folder"),
        ("w.csv", "", "no weight for a, b, c; name every class"),
        ("w.csv", b"a,\xff\n", "no text in UTF-8"),
        ("none.csv", None, "No such file or directory; give balanced, or a CSV or JSON file"),
    ],
)
def test_a_file_that_will_not_do_is_answered_in_one_line(tmp_path: Path, name, text, said):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        class_weights(str(tmp_path / name), folder(4, 4, 4))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_without_end_is_not_read_to_the_end():
    with pytest.raises(UserError, match="/dev/zero: more than 16,000,000 bytes"):
        class_weights("/dev/zero", folder(1))


def test_a_saved_run_s_weights_can_be_given_again(tmp_path: Path):
    """As args.json holds them: a list in the order of the classes."""
    found = class_weights("balanced", folder(1, 2, 5))
    named = dict(zip("abc", json.loads(json.dumps(found)), strict=True))
    (tmp_path / "w.json").write_text(json.dumps(named))
    assert class_weights(str(tmp_path / "w.json"), folder(9, 9, 9)) == found


def test_the_data_s_name_is_of_paths_and_labels(tmp_path: Path):
    """An empty folder moves the labels of those behind it, and no path."""
    write_tree(tmp_path, 1, 1)
    where, recipe, names = DataSettings(str(tmp_path)), RECIPE.override(batch_size=3), []
    for _ in range(2):
        data = open_training_data(where, recipe, None, Start(), Context(torch.device("cpu")))
        names.append(data.digest)
        (tmp_path / "train" / "aa").mkdir(exist_ok=True)
    assert names[0] != names[1]

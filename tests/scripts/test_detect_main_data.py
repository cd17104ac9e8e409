"""detect_main.py: data that others have made, from the command line to the files it leaves."""

import csv
import json
import shutil
import warnings
from pathlib import Path

import pytest
from helpers.coco_trees import DIGITS, NETWORK

from utils.runs import checkpoint
from utils.system.errors import UserError

pytestmark = pytest.mark.usefixtures("thin")

QUICK = (*NETWORK, "--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
ADDED = 10**17


def edited(shapes: Path, folder: Path, change, parts=("train", "val")) -> Path:
    """A copy of the tree with its annotations changed."""
    root = Path(shutil.copytree(shapes, folder))
    for part in parts:
        path = root / "annotations" / f"instances_{part}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return root


def eager(path: Path) -> Path:
    """Makes a RetinaNet of a few steps find something: every class is as likely as not."""
    saved = checkpoint.load(path)
    (key,) = (key for key in saved["state_dict"] if key.endswith("cls_logits.bias"))
    saved["state_dict"][key] = saved["state_dict"][key] + 5
    checkpoint.save(path, saved)
    return path


def enlarge_ids(content):
    for entry in content["images"] + content["categories"]:
        entry["id"] += ADDED
    for entry in content["annotations"]:
        entry["image_id"] += ADDED
        entry["category_id"] += ADDED


def test_large_ids_and_files_without_annotations(detect, shapes, tmp_path):
    """The same run and figures as with small ids, and the file's own ids in what is written."""
    large = edited(shapes, tmp_path / "large", enlarge_ids)
    flags = (*QUICK, "--epochs", 1, "--seed", 1)
    small_lines = detect(*flags, "--output", "one", shapes)
    large_lines = detect(*flags, "--output", "two", large)
    small, large_table = (
        lines[lines.index("epoch 1, the best:") :][1:9] for lines in (small_lines, large_lines)
    )
    assert small == large_table
    one, two = ((tmp_path / name / "metrics.csv").read_text() for name in ("one", "two"))
    assert one == two

    network = eager(tmp_path / "two" / "best.pth")
    detect("-e", "--resume", network, large, "--results-json", "a.json", "--picture", "a.png")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found
    assert {result["image_id"] for result in found} <= {ADDED + n for n in range(1, 6)}
    assert {result["category_id"] for result in found} <= {ADDED + n for n in range(1, 6)}

    bare = edited(large, tmp_path / "bare", lambda c: c.pop("annotations"), ["val"])
    lines = detect("-e", "--resume", network, bare, "--results-json", "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == found
    assert "  ! no object has a box: box AP will be -" in lines
    (box,) = (line for line in lines if line.startswith("box "))
    assert box.split() == ["box", *["-"] * 12]


def test_validation_images_without_objects(detect, shapes, tmp_path):
    """The last epoch is the best, and no figure is shown where there is none."""
    empty = edited(shapes, tmp_path / "data", lambda c: c["annotations"].clear(), ["val"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = detect(*QUICK, "--epochs", 2, "--seed", 1, empty, "--output", "run")
    assert not [str(w.message) for w in caught if "matplotlib" in str(w.filename)]
    assert "val: 5 images, 5 of them without objects, 0 objects of 5 classes" in lines
    assert "  ! no object has a box: box AP will be -" in lines
    shown = [line for line in lines if line.startswith(("epoch 1/2  train", "epoch 2/2  train"))]
    assert all("box AP - AP50 -  " in line for line in shown)
    assert [line.endswith("(best)") for line in shown] == [True, True]
    assert "epoch 2, the best:" in lines
    assert any(line.startswith("done: best box AP - AP50 - (epoch 2)") for line in lines)
    assert not any("-1.0" in line or "-100" in line for line in lines)
    assert checkpoint.load(tmp_path / "run" / "best.pth")["progress"]["epoch"] == 2


def test_validation_images_without_one_of_the_classes(detect, shapes, tmp_path):
    def remove(content):
        content["categories"] = [c for c in content["categories"] if c["name"] != "digit 2"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 3]

    data = edited(shapes, tmp_path / "data", remove, ["val"])
    lines = detect(*QUICK, "--epochs", 1, data, "--output", "run")
    assert any("1 class of the network" in line and "digit 2" in line for line in lines)
    rows = {name: line for line in lines for name in DIGITS if line.startswith(f"{name} ")}
    assert rows.keys() == set(DIGITS)
    assert rows["digit 2"].split() == ["digit", "2", "-"]
    network = eager(tmp_path / "run" / "best.pth")
    again = detect("-e", "--resume", network, data, "--results-json", "found.json")
    assert any(line.split() == ["digit", "2", "-"] for line in again)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found
    assert 3 not in {result["category_id"] for result in found}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("retinanet", {"bbox": [1, 2, 3, 4, 5]}, "box is not four numbers; python -m tools"),
        ("mask_rcnn", {"segmentation": []}, "mask is no polygon; mend them, or train faster"),
    ],
)
def test_nothing_to_train_on_ends_the_run_before_it_begins(
    detect, shapes, tmp_path, arch, changes, message
):
    def change(content):
        for entry in content["annotations"]:
            entry.update(changes)

    data = edited(shapes, tmp_path / "data", change, ["train"])
    with pytest.raises(UserError, match=f"no object to train on: .*{message}") as error:
        detect(*QUICK, "-a", arch, data, "--output", "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

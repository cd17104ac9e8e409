"""Names in files of strangers move no cursor on a terminal and compute nothing in a spreadsheet."""

import csv
import sys

import pytest

import main
import predict
from tools import check_images, compare_runs
from utils.inspection.predictions import CocoDocument, Guess, Prediction, PredictionLog
from utils.runs import checkpoint

EVIL = "\x1b[2J\nerror: all is well"


@pytest.mark.parametrize(
    ("script", "field"), [(main, "arch"), (predict, "arch"), (predict, "classes")]
)
def test_a_checkpoint_s_texts_move_no_cursor(call, run_folder, tree, script, field):
    path = run_folder / "last.pth"
    state = checkpoint.load(path)
    state[field] = EVIL if field == "arch" else [EVIL, *state["classes"][1:]]
    checkpoint.save(path, state)
    words = ("-e", "--resume", path, tree) if script is main else (path, next(tree.glob("val/*/*")))
    code, out, err = call(*words, "--device", "cpu", entry=script.main)
    assert code == (2 if field == "arch" else 0)
    assert "\x1b" not in "".join([*out, *err])
    assert "\\x1b[2J" in "".join([*out, *err])
    assert not any(line.startswith("error: all is well") for line in (*out, *err))


def test_file_and_class_names_are_text_for_a_spreadsheet(tmp_path, monkeypatch):
    log = PredictionLog("table", ["=1+1.png"], topk=1)
    log.add(Prediction("=1+1.png", (Guess(0, "@SUM(A1)", 0.5),)))
    log.write(tmp_path)
    rows = list(csv.reader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert rows[1] == ["'=1+1.png", "'@SUM(A1)", "0.500000", ""]

    document = CocoDocument(["+class"], [7])
    document.images.append({"id": 1, "file_name": "-file.png"})
    found = {"image_id": 1, "category_id": 7, "score": 0.25, "bbox": [-1.0, 0.0, 2.0, 3.0]}
    document.annotations.append(found)
    rows = list(csv.reader(document.csv().splitlines()))
    assert rows[1] == ["'-file.png", "'+class", "0.250000", "-1.00", "0.00", "1.00", "3.00"]

    (tmp_path / "=x" / "a").mkdir(parents=True)
    (tmp_path / "=x" / "a" / "y.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_images", "=x", "--output", "bad.csv"])
    assert check_images.main() == 1
    with open("bad.csv") as file:
        assert list(csv.reader(file))[1] == ["'=x/a/y.png", "not an image"]


def test_run_names_are_text_for_a_spreadsheet_and_numbers_stay():
    rows = [["=run", "resnet18", "-", "2/2", "-1.50", "nan", "+a"]]
    assert compare_runs.csv_rows(rows) == [["'=run", "resnet18", "-", "2/2", "-1.50", "nan", "'+a"]]

"""A detector's report, and what a report says; its figures are tested with COCO's."""

import csv
import json

import numpy as np
import pytest
from helpers.coco_trees import NETWORK
from PIL import Image

from utils.inspection.pictures import draw_precision_recall
from utils.inspection.report import report_lines

pytest.importorskip("pycocotools")


def test_a_detector_s_report_is_written_where_a_classifier_s_is(thin, detect, shapes, tmp_path):
    flags = ("--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
    detect(*NETWORK, *flags, "--epochs", 1, "--seed", 1, "--output", "run", shapes)
    lines = detect("-e", "--resume", "run/best.pth", "--report", shapes)
    assert lines[-1].endswith("-m tools.run_report run")
    assert lines[-2].startswith("report written to run/report: box_precision_recall.png, classes.")
    folder = tmp_path / "run" / "report"
    for name in ("box_precision_recall", "worst_images"):
        with Image.open(folder / f"{name}.png") as picture:
            picture.load()
    record = json.loads((folder / "report.json").read_text())
    with open(folder / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    there = [float(row["box_AP"]) for row in rows if row["objects"] != "0"]
    assert np.mean(there) == pytest.approx(record["box_AP"], abs=1e-3)
    with open(folder / "worst_images.csv") as file:
        faults = [int(row["missed"]) + int(row["false"]) for row in csv.DictReader(file)]
    assert len(faults) == record["images"] == 5
    assert faults == sorted(faults, reverse=True)


def test_a_curve_of_each_class_and_of_their_mean(figures):
    precision = np.array([[1, 0.5, 0], [-1, -1, -1], [0.5, 0.5, 0.5]])
    draw_precision_recall(precision, ["ant", "bee", "_c"], "t")
    (axis,) = figures[0].axes
    ant, c, mean = axis.lines
    assert [line.get_ydata().tolist() for line in (ant, c)] == [[100, 50, 0], [50, 50, 50]]
    assert mean.get_ydata().tolist() == [75, 50, 25]
    (legend,) = figures[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["ant 50.0", "\u200b_c 50.0", "all 2 classes 50.0"]
    assert axis.get_xlim() == axis.get_ylim() == (0, 100)


@pytest.mark.parametrize("n", [3, 30])
def test_the_weakest_of_many_classes_are_said(tmp_path, n):
    lines = ["number,class,support,predicted,precision,recall,f1,top1,top5"]
    lines += [f"{i},c{i},{int(i > 0)},1,50.0,25.0,{100 - i}.0,25.0,75.0" for i in range(n)]
    (tmp_path / "classes.csv").write_text("\n".join(lines))
    head, table, files = ([""] if n < 10 else []) + report_lines(tmp_path)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["class", "support", "precision", "recall", "f1", "top5"]
    shown = [row[0] for row in rows[1:]]
    if n < 10:
        assert shown == ["c1", "c2"]  # c0 has no image
    else:
        assert head == "the 10 of 29 classes with the lowest f1:"
        assert shown == [f"c{i}" for i in range(29, 19, -1)]
        assert rows[1] == ["c29", "1", "50.00", "25.00", "71.00", "75.00"]
    assert files == f"report written to {tmp_path}: classes.csv"

"""A detector's report: figures by class and faults by image, against pycocotools' own."""

import csv
import json

import numpy as np
import pytest
from helpers.coco_results import by_hand, random_case
from helpers.coco_trees import NETWORK
from PIL import Image

from utils.data.coco_dataset import load_split
from utils.data.coco_eval import BACKENDS, GroundTruth
from utils.inspection.pictures import draw_precision_recall
from utils.inspection.report import detection_faults, report_lines

pytest.importorskip("pycocotools")


@pytest.mark.parametrize("backend", BACKENDS)
def test_figures_by_class_are_those_of_pycocotools(tmp_path, backend):
    paths, results = random_case(tmp_path)
    truth = GroundTruth(paths, masks=True)
    figures = truth.by_class(results, backend)
    summaries = truth.evaluate(results, backend)
    for kind, ours in figures.items():
        theirs = by_hand(paths, results, kind)
        precision = theirs.eval["precision"][..., 0, -1]
        np.testing.assert_allclose(ours.precision, precision[0].T, atol=1e-12)
        np.testing.assert_allclose(ours.recall, theirs.eval["recall"][0, :, 0, -1], atol=1e-12)
        assert ours.precision.mean() == pytest.approx(theirs.stats[1])  # AP50
        assert ours.ap.mean() == pytest.approx(theirs.stats[0])
        assert dict(zip(ours.names, ours.ap, strict=True)) == pytest.approx(
            summaries[kind].per_class
        )
        plain = [a for a in theirs.cocoGt.anns.values() if not a["iscrowd"]]
        ids = sorted(theirs.cocoGt.cats)
        counts = [sum(a["category_id"] == i for a in plain) for i in ids]
        assert ours.objects.tolist() == counts


def test_faults_of_images_are_pycocotools_matches(tmp_path):
    paths, results = random_case(tmp_path, images=30, crowds=False)
    split = load_split(paths)
    faults = detection_faults(split, results)
    sure = [result for result in results if result["score"] >= 0.5]
    expected = np.zeros((30, 2), int)
    for entry in by_hand(paths, sure, "bbox").evalImgs:
        if entry is not None and entry["aRng"] == [0, 1e10]:
            row = split.image_ids.index(entry["image_id"])
            expected[row] += [(entry[f"{part}Matches"][0] == 0).sum() for part in ("gt", "dt")]
    assert faults.sum(0).min() > 3
    np.testing.assert_array_equal(faults, expected)


def test_a_detector_s_report_is_written_where_a_classifier_s_is(detect, shapes, tmp_path):
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
    detect("-e", "--resume", "run/best.pth", "--report", "--output", "out", shapes)
    assert json.loads((tmp_path / "out" / "report" / "report.json").read_text())["box_AP"] >= 0


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

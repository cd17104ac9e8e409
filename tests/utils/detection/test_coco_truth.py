"""Figures over odd annotations: without area, box, mask or any object, with ids of any size."""

import json

import numpy as np
import pytest
from helpers.coco_results import SIZE, by_hand, random_case
from helpers.coco_trees import annotation, write_tree

from utils.detection import coco_masks
from utils.detection.coco_evaluation import BACKENDS, GroundTruth
from utils.detection.coco_files import locate
from utils.detection.coco_truth import JudgedObjects


def test_annotations_that_pycocotools_would_break_on(tmp_path):
    """No area, no iscrowd, an id of 0, which it takes for no match, and ids that repeat."""
    bare = [
        annotation(0, 1, 1, area=None, iscrowd=None),
        annotation(0, 2, 7, area=None, iscrowd=None),
    ]
    truth = GroundTruth(locate(write_tree(tmp_path, bare), "val"), masks=False)
    results = [
        {"image_id": i, "category_id": c, "bbox": [10, 10, 20, 30], "score": 0.9}
        for i, c in ((1, 1), (2, 7))
    ]
    for backend in BACKENDS:
        assert truth.judge(results, backend)["bbox"].figures["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("area", [float("nan"), float("inf"), "600", -1, True, [600]])
@pytest.mark.parametrize("masks", [False, True])
def test_an_area_that_is_none_is_counted_anew(tmp_path, area, masks):
    tree = write_tree(tmp_path, [annotation(area=area)])
    for (kept,) in JudgedObjects(locate(tree, "val"), masks).annotations.values():
        assert kept["area"] == 600


@pytest.mark.parametrize("box", [[1, 2, 3, "4"], [1, 2, 3, "x"], [1, 2, True, 4], [1, 2, 3], None])
def test_a_box_that_is_none_is_not_judged(tmp_path, box):
    bad = {**annotation(2, 2), "bbox": box}
    objects = JudgedObjects(locate(write_tree(tmp_path, [annotation(), bad]), "val"), masks=True)
    assert [kept["bbox"] for kept in objects.annotations["bbox"]] == [[10, 10, 20, 30]]
    assert [kept["id"] for kept in objects.annotations["segm"]] == [1, 2]  # it has a mask
    assert objects.lines == ["  not evaluated: 1 objects without a finite box of four numbers"]


def test_what_cannot_be_judged_is_said(tmp_path):
    bad = [annotation(), annotation(2, 2, segmentation=None), annotation(3, 2, bbox=(0, 0, 9, 9))]
    bad[2]["bbox"][0] = float("nan")
    bad.append(annotation(4, 3, iscrowd=1))
    objects = JudgedObjects(locate(write_tree(tmp_path, bad), "val"), True, ["cat", "cow", "dog"])
    assert objects.report("val") == [
        "val: 3 images, 1 of them without objects, 2 objects of 2 classes",
        "  not evaluated: 1 objects without a finite box of four numbers",
        "  ignored for masks: 1 objects without a usable mask",
        "  ! 1 classes of the network are not among the categories, such as cow: their "
        "detections are left out",
    ]


NO_MASKS = [
    None,
    [],
    [[]],
    [[1.0, 2.0, 3.0, 4.0]],
    [1.0, 2.0, 3.0, 4.0],
    [[10, 10], [30, 10], [30, 40]],
    [{"size": [48, 64], "counts": [5, 5]}],
    {"size": [48, 64], "counts": [0.5, 3071.5]},
    {"size": [48, 64], "counts": [1, 2]},
    {"size": [64, 48], "counts": [1, 3071]},
    "text",
    7,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmentation", NO_MASKS)
def test_an_object_without_a_mask_keeps_its_box(tmp_path, backend, segmentation):
    """Box figures are pycocotools' on the same file; for masks the object is as a crowd."""
    entries = [annotation(1), annotation(2, 2, 7), annotation(3, 2, 1, (30, 5, 30, 40))]
    entries[1]["segmentation"] = segmentation
    place = locate(write_tree(tmp_path, entries), "val")
    whole = {"size": [48, 64], "counts": coco_masks.run_lengths(box_mask(10, 10, 20, 30))}
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [11, 10, 20, 30], "score": 0.9},
        {"image_id": 2, "category_id": 7, "bbox": [10, 10, 20, 28], "score": 0.8},
    ]
    text = coco_masks.to_rle(whole, 48, 64)["counts"].decode()
    for result in results:
        result["segmentation"] = {"size": [48, 64], "counts": text}
    found = GroundTruth(place, masks=True).judge(results, backend)
    expected = by_hand(place, results, "bbox")
    np.testing.assert_allclose(list(found["bbox"].figures.values()), expected.stats, atol=1e-9)
    assert found["bbox"].per_class["dog"] == pytest.approx(0.8, abs=0.11)
    entries[1]["iscrowd"] = 1
    entries[1]["segmentation"] = whole
    place = locate(write_tree(tmp_path / "crowd", entries), "val")
    expected = by_hand(place, results, "segm")
    np.testing.assert_allclose(list(found["segm"].figures.values()), expected.stats, atol=1e-9)


def box_mask(x, y, w, h):
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("added", [10**17, 2**64])
def test_ids_of_any_size_give_the_same_figures(tmp_path, backend, added):
    place, results = random_case(tmp_path)
    expected = {kind: by_hand(place, results, kind).stats for kind in ("bbox", "segm")}
    content = json.loads(place.annotations.read_text())
    for entry in content["images"] + content["categories"] + content["annotations"]:
        entry["id"] += added
    for entry in content["annotations"] + results:
        entry["image_id"] += added
        entry["category_id"] += added
    place.annotations.write_text(json.dumps(content))
    before = json.dumps(results)
    found = GroundTruth(place, masks=True).judge(results, backend)
    assert json.dumps(results) == before
    for kind, stats in expected.items():
        np.testing.assert_allclose(list(found[kind].figures.values()), stats, atol=1e-9)
        assert 0.05 < found[kind].figures["AP"] < 0.95


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_without_objects(tmp_path, backend, listed):
    place = locate(write_tree(tmp_path, []), "val")
    if not listed:
        content = json.loads(place.annotations.read_text())
        del content["annotations"]
        place.annotations.write_text(json.dumps(content))
    results = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30], "score": 0.5}]
    truth = GroundTruth(place, masks=False)
    (summary,) = truth.judge(results, backend).values()
    assert set(summary.figures.values()) == {-1.0}
    assert truth.objects.lines == ["  ! no object has a box: box AP will be -"]

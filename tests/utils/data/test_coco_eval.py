"""COCO's figures against pycocotools: over ranks, with nothing detected, over odd annotations."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from helpers.coco_trees import annotation, write_tree
from pycocotools import mask as pycocotools

from utils.data import coco_masks
from utils.data.coco import check_file, locate
from utils.data.coco_dataset import load_split
from utils.data.coco_eval import FIGURES, GroundTruth, gather, to_results
from utils.inspection.report import detection_faults
from utils.system.distributed import Context
from utils.system.errors import UserError

SIZE = (48, 64)


def random_case(root, images=12, seed=0, crowds=True):
    """A tree of random objects, and detections that hit, miss and repeat them, with masks."""
    chance = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        for _ in range(int(chance.integers(0, 5))):
            w, h = chance.integers(4, 40, 2)
            x, y = chance.integers(0, SIZE[1] - w + 1), chance.integers(0, SIZE[0] - h + 1)
            x, y, w, h = map(int, (x, y, w, h))
            category = int(chance.choice([1, 7]))
            mask = np.zeros(SIZE, dtype=bool)
            mask[y : y + h, x : x + w] = chance.random((h, w)) < 0.8
            counts = {"size": list(SIZE), "counts": coco_masks.run_lengths(mask)}
            annotations.append(
                annotation(
                    len(annotations) + 1,
                    image_id,
                    category,
                    (x, y, w, h),
                    segmentation=counts,
                    area=int(mask.sum()),
                    iscrowd=int(crowds and chance.random() < 0.1),
                )
            )
            for _ in range(int(chance.integers(0, 3))):
                shift = chance.normal(0, 1, 4)
                seen = mask ^ (chance.random(SIZE) < 0.05)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if chance.random() < 0.8 else 8 - category,
                        "bbox": [float(v + s) for v, s in zip((x, y, w, h), shift, strict=True)],
                        "score": float(chance.random()),
                        "segmentation": coco_masks.encode(seen[None])[0],
                    }
                )
    return locate(write_tree(root, annotations, images), "val"), results


def by_hand(paths, results, kind):
    """pycocotools, fed as its own examples do: from files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    drop = "segmentation" if kind == "bbox" else "bbox"
    path = paths.annotations.with_name("results.json")
    path.write_text(json.dumps([{k: v for k, v in r.items() if k != drop} for r in results]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(paths.annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(path)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_pycocotools(tmp_path, kind):
    paths, results = random_case(tmp_path)
    before = json.dumps(results)
    found = GroundTruth(paths, masks=True).evaluate(results)[kind]
    assert json.dumps(results) == before
    expected = by_hand(paths, results, kind)
    assert list(found.figures) == list(FIGURES)
    np.testing.assert_allclose(list(found.figures.values()), expected.stats, atol=1e-9)
    assert 0.05 < found.figures["AP"] < 0.95  # a case that means something
    precision = expected.eval["precision"][:, :, :, 0, -1]
    for i, name in enumerate(("cat", "dog")):
        assert found.per_class[name] == pytest.approx(precision[:, :, i].mean())


def test_a_masks_size_class_goes_by_its_pixels(tmp_path):
    """A wrong mask of 36 pixels in a box of 1,600 is a small detection: APm does not see it."""
    square, speck = [[2, 2, 42, 2, 42, 42, 2, 42]], [[2, 2, 8, 2, 8, 8, 2, 8]]
    object_ = annotation(1, 1, 1, (2, 2, 40, 40), segmentation=square)
    paths = locate(write_tree(tmp_path, [object_], size=(80, 80)), "val")
    results = [
        {
            "image_id": image,
            "category_id": 1,
            "bbox": [2, 2, 40, 40],
            "score": 0.5 + image / 10,
            "segmentation": as_text(polygons),
        }
        for image, polygons in ((1, square), (2, speck))
    ]
    found = GroundTruth(paths, masks=True).evaluate(results)
    for kind in ("bbox", "segm"):
        expected = by_hand(paths, results, kind).stats
        np.testing.assert_allclose(list(found[kind].figures.values()), expected, atol=1e-9)
    assert found["segm"].figures["APm"] == pytest.approx(1.0)
    assert found["bbox"].figures["APm"] == pytest.approx(0.5)


def test_no_detection_and_no_object(tmp_path):
    paths, _ = random_case(tmp_path / "random")
    summaries = GroundTruth(paths, masks=True).evaluate([])
    assert summaries["segm"].figures["AP"] == 0
    assert summaries["bbox"].figures["AR100"] == 0
    paths = locate(write_tree(tmp_path, [annotation(category_id=1)]), "val")
    results = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30], "score": 0.5}]
    summary = GroundTruth(paths, masks=False).evaluate(results)["bbox"]
    assert summary.per_class == {"cat": pytest.approx(1.0), "dog": -1.0}
    assert summary.figures["APl"] == -1.0


def test_a_class_that_only_the_network_has(tmp_path):
    paths = locate(write_tree(tmp_path, [annotation(category_id=1)]), "val")
    found = {
        "boxes": torch.tensor([[10.0, 10.0, 30.0, 40.0], [0.0, 0.0, 20.0, 20.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.5, 0.9]),
        "masks": torch.zeros(2, 1, 48, 64),
    }
    results = to_results(found, 1, [1, None, 7], first_label=1)
    assert [result["category_id"] for result in results] == [1]
    truth = GroundTruth(paths, masks=False, classes=["cat", "cow", "dog"])
    (summary,) = truth.evaluate(results).values()
    assert summary.per_class == {"cat": pytest.approx(1.0), "dog": -1.0, "cow": -1.0}


def test_an_evaluator_is_looked_for_at_once(tmp_path, monkeypatch):
    paths, _ = random_case(tmp_path)
    for name in ("faster_coco_eval",):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="needs faster_coco_eval: pip install"):
        GroundTruth(paths, masks=False)


def test_results_in_cocos_format():
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, 2:4, 1:6] = 0.9
    masks[0, 0, 5] = 0.5  # not above a half
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 6.0, 4.0], [0.0, 0.0, 2.0, 2.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.25]),
        "masks": masks,
    }
    first, second = to_results(found, 42, [1, 7], first_label=1)
    assert (first["image_id"], first["category_id"], second["category_id"]) == (42, 1, 7)
    assert first["bbox"] == [1, 2, 5, 2]
    mask = coco_masks.decode(coco_masks.to_rle(first["segmentation"], 8, 8))
    assert np.array_equal(mask, masks[0, 0].numpy() > 0.5)
    assert json.loads(json.dumps([first, second])) == [first, second]
    assert to_results({k: v[:0] for k, v in found.items()}, 42, [1, 7], 1) == []


def test_a_detection_that_is_not_finite_is_an_error():
    found = {
        "boxes": torch.full((1, 4), torch.nan),
        "labels": torch.ones(1, dtype=torch.int64),
        "scores": torch.ones(1),
    }
    with pytest.raises(UserError, match="image 3"):
        to_results(found, 3, [1], 1)


def test_all_ranks_detections_come_to_rank_0_by_image(monkeypatch):
    def gather_object(results, parts, root, group):
        if parts is not None:
            parts[:] = [results, [{"image_id": 2}]]

    monkeypatch.setattr("torch.distributed.gather_object", gather_object)
    results = [{"image_id": 3}, {"image_id": 1}]
    cpu = torch.device("cpu")
    assert gather(results, Context(cpu)) == [{"image_id": 1}, {"image_id": 3}]
    assert gather(results, Context(cpu, 0, 2)) == [{"image_id": n} for n in (1, 2, 3)]
    assert gather(results, Context(cpu, 1, 2)) is None


def test_annotations_that_pycocotools_would_break_on(tmp_path):
    """No area, no iscrowd, an id of 0, which it takes for no match, and ids that repeat."""
    bare = [annotation(0, i, c, area=None, iscrowd=None) for i, c in ((1, 1), (2, 7))]
    truth = GroundTruth(locate(write_tree(tmp_path, bare), "val"), masks=False)
    results = [
        {"image_id": i, "category_id": c, "bbox": [10, 10, 20, 30], "score": 0.9}
        for i, c in ((1, 1), (2, 7))
    ]
    assert truth.evaluate(results)["bbox"].figures["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("area", [float("nan"), float("inf"), "600", -1, True, [600]])
@pytest.mark.parametrize("masks", [False, True])
def test_an_area_that_is_none_is_counted_anew(tmp_path, area, masks):
    tree = write_tree(tmp_path, [annotation(area=area)])
    for (entry,) in GroundTruth(locate(tree, "val"), masks).annotations.values():
        assert entry["area"] == 600


@pytest.mark.parametrize("detector", ["boxes", "masks"])
def test_without_an_area_it_is_the_masks_for_every_detector(tmp_path, detector):
    """Triangles of under 32² pixels in boxes of over 32²: APs and APm tell the two areas apart."""
    sides = (40, 44, 30, 60)
    entries = []
    for number, side in enumerate(sides, 1):
        corners = [[2, 2, 2 + side, 2, 2, 2 + side]]
        box = (2, 2, side, side)
        entries.append(annotation(number, number, 1, box, segmentation=corners, area=None))
    tree = write_tree(tmp_path / "without", entries, images=4, size=(80, 80))
    results = [
        {
            "image_id": entry["image_id"],
            "category_id": 1,
            "bbox": [*entry["bbox"][:3], entry["bbox"][3] - (4 if number % 2 else 16)],
            "score": 0.5 + number / 10,
            "segmentation": as_text(entry["segmentation"]),
        }
        for number, entry in enumerate(entries)
    ]
    truth = GroundTruth(locate(tree, "val"), masks=detector == "masks")
    found = truth.evaluate(results)
    for entry in entries:
        rle = pycocotools.merge(pycocotools.frPyObjects(entry["segmentation"], 80, 80))
        entry["area"] = int(pycocotools.area(rle))
    assert [entry["area"] < 32**2 for entry in entries] == [True, True, True, False]
    tree = write_tree(tmp_path / "with", entries, images=4, size=(80, 80))
    for kind in truth.kinds:
        expected = by_hand(locate(tree, "val"), results, kind).stats
        np.testing.assert_allclose(list(found[kind].figures.values()), expected, atol=1e-9)
    assert found["bbox"].figures["APs"] != found["bbox"].figures["APm"]


def as_text(polygons):
    rle = pycocotools.merge(pycocotools.frPyObjects(polygons, 80, 80))
    return {"size": [80, 80], "counts": rle["counts"].decode()}


ODD_BOXES = {  # what is no box in COCO's meaning, and what is said of it
    "corners": ((30, 20, 60, 45), "1 of 2 boxes reach out of their images"),
    "flat": ((10, 10, 20, 0), "under 1 pixel, or outside the image (first in picture-2.png)"),
    "negative": ((30, 40, -20, -30), "under 1 pixel, or outside"),
    "outside": ((70, 10, 20, 30), "under 1 pixel, or outside"),
    "fractions": ((0.1, 0.1, 0.5, 0.5), "all its numbers from 0 to 1"),
}


@pytest.mark.parametrize("kind", ODD_BOXES)
def test_odd_boxes_are_evaluated_as_by_pycocotools_and_said(tmp_path, kind):
    box, said = ODD_BOXES[kind]
    entries = [annotation(1), annotation(2, 2, 1, box, segmentation=None, area=600)]
    paths = locate(write_tree(tmp_path, entries), "val")
    truth = GroundTruth(paths, masks=False)
    (line,) = truth.report("val")[1:]
    assert said in line
    assert any(said.partition(" (first")[0] in reason for _, reason in check_file(paths)[1])
    results = [
        {"image_id": image, "category_id": 1, "bbox": [10, 10, 20, 30], "score": 0.9}
        for image in (1, 2)
    ]
    found = truth.evaluate(results)["bbox"]
    expected = by_hand(paths, [{**r, "segmentation": None} for r in results], "bbox").stats
    np.testing.assert_allclose(list(found.figures.values()), expected, atol=1e-9)


def test_what_cannot_be_evaluated_is_said(tmp_path):
    bad = [annotation(), annotation(2, 2, segmentation=None), annotation(3, 2, bbox=(0, 0, 9, 9))]
    bad[2]["bbox"][0] = float("nan")
    bad += [annotation(4, 3, iscrowd=1), annotation(5, 2, bbox=(1, 2, 3, 4, 5), area=20)]
    truth = GroundTruth(locate(write_tree(tmp_path, bad), "val"), True, ["cat", "cow", "dog"])
    assert truth.report("val") == [
        "val: 3 images, 1 of them without objects, 2 objects of 2 classes",
        "  ! 1 object that no detection can match: mask is no polygon (first in picture-2.png)",
        "  ! 1 object that no detection can match: box is not finite (first in picture-2.png)",
        "  ! 1 object that no detection can match: box is not four numbers (first in "
        "picture-2.png)",
        "  ! 1 class of the network not among the categories, such as cow: such "
        "detections are left out",
    ]


@pytest.mark.parametrize(
    "segmentation", [None, [[1.0, 2.0, 3.0, 4.0]], {"size": [64, 48], "counts": [1, 3071]}, "text"]
)
def test_an_object_without_a_mask_keeps_its_box(tmp_path, segmentation):
    """Box figures are pycocotools' on the same file; for masks the object is as a crowd."""
    entries = [annotation(1), annotation(2, 2, 7), annotation(3, 2, 1, (30, 5, 30, 40))]
    entries[1]["segmentation"] = segmentation
    paths = locate(write_tree(tmp_path, entries), "val")
    whole = {"size": [48, 64], "counts": coco_masks.run_lengths(box_mask(10, 10, 20, 30))}
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [11, 10, 20, 30], "score": 0.9},
        {"image_id": 2, "category_id": 7, "bbox": [10, 10, 20, 28], "score": 0.8},
    ]
    text = coco_masks.to_rle(whole, 48, 64)["counts"].decode()
    for result in results:
        result["segmentation"] = {"size": [48, 64], "counts": text}
    found = GroundTruth(paths, masks=True).evaluate(results)
    expected = by_hand(paths, results, "bbox")
    np.testing.assert_allclose(list(found["bbox"].figures.values()), expected.stats, atol=1e-9)
    assert found["bbox"].per_class["dog"] == pytest.approx(0.8, abs=0.11)
    entries[1]["iscrowd"] = 1
    entries[1]["segmentation"] = whole
    paths = locate(write_tree(tmp_path / "crowd", entries), "val")
    expected = by_hand(paths, results, "segm")
    np.testing.assert_allclose(list(found["segm"].figures.values()), expected.stats, atol=1e-9)


def box_mask(x, y, w, h):
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


@pytest.mark.parametrize("added", [10**17, 2**64])
def test_ids_of_any_size_give_the_same_figures(tmp_path, added):
    paths, results = random_case(tmp_path)
    expected = {kind: by_hand(paths, results, kind).stats for kind in ("bbox", "segm")}
    content = json.loads(paths.annotations.read_text())
    for entry in content["images"] + content["categories"] + content["annotations"]:
        entry["id"] += added
    for entry in content["annotations"] + results:
        entry["image_id"] += added
        entry["category_id"] += added
    paths.annotations.write_text(json.dumps(content))
    before = json.dumps(results)
    found = GroundTruth(paths, masks=True).evaluate(results)
    assert json.dumps(results) == before
    for kind, stats in expected.items():
        np.testing.assert_allclose(list(found[kind].figures.values()), stats, atol=1e-9)
        assert 0.05 < found[kind].figures["AP"] < 0.95


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_without_objects(tmp_path, listed):
    paths = locate(write_tree(tmp_path, []), "val")
    if not listed:
        content = json.loads(paths.annotations.read_text())
        del content["annotations"]
        paths.annotations.write_text(json.dumps(content))
    results = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30], "score": 0.5}]
    truth = GroundTruth(paths, masks=False)
    (summary,) = truth.evaluate(results).values()
    assert set(summary.figures.values()) == {-1.0}
    assert truth.report("val")[1:] == ["  ! no object has a box: box AP will be -"]


@pytest.mark.parametrize(("objects", "said"), [(100, False), (101, True)])
def test_more_objects_than_coco_counts_detections_are_said(tmp_path, objects, said):
    root = write_tree(tmp_path / "coco", [annotation(n) for n in range(1, objects + 1)])
    lines = GroundTruth(locate(root, "val"), masks=False).report("val")
    assert any("1 image with more than 100 objects" in line for line in lines) is said


def test_figures_by_class_are_those_of_pycocotools(tmp_path):
    paths, results = random_case(tmp_path)
    truth = GroundTruth(paths, masks=True)
    figures = truth.by_class(results)
    summaries = truth.evaluate(results)
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


def test_the_surest_detection_takes_its_object_first(tmp_path):
    """Two objects that overlap; the surer detection fits both, the other one the first alone."""
    boxes = [(0, 0, 10, 10), (0, 4, 10, 10)]
    truth = [annotation(number, bbox=box) for number, box in enumerate(boxes, 1)]
    split = load_split(locate(write_tree(tmp_path / "coco", truth), "val"))
    found = {0.6: (0, 0, 10, 10), 0.9: (0, 1, 10, 10)}
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
        for score, box in found.items()
    ]
    assert detection_faults(split, results)[0].tolist() == [1, 1]

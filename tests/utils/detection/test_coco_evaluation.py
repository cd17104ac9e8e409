"""COCO's figures: against pycocotools, over ranks, with nothing found and nothing to find."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.coco_results import by_hand, random_case
from helpers.coco_trees import annotation, write_tree

from utils.detection import coco_masks
from utils.detection.coco_evaluation import BACKENDS, FIGURES, GroundTruth, gather, to_results
from utils.detection.coco_files import locate
from utils.system.distributed import Context
from utils.system.errors import UserError


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_pycocotools(tmp_path, backend, kind):
    place, results = random_case(tmp_path)
    before = json.dumps(results)
    found = GroundTruth(place, masks=True).judge(results, backend)[kind]
    assert json.dumps(results) == before
    expected = by_hand(place, results, kind)
    assert list(found.figures) == list(FIGURES)
    np.testing.assert_allclose(list(found.figures.values()), expected.stats, atol=1e-9)
    assert 0.05 < found.figures["AP"] < 0.95  # a case that means something
    precision = expected.eval["precision"][:, :, :, 0, -1]
    for i, name in enumerate(("cat", "dog")):
        assert found.per_class[name] == pytest.approx(precision[:, :, i].mean())


def test_many_detections_agree(tmp_path):
    """Two figures from thousands of boxes, as one epoch of COCO would give, to six digits."""
    chance = np.random.default_rng(1)
    place, _ = random_case(tmp_path, images=60, seed=1)
    results = [
        {
            "image_id": int(chance.integers(1, 61)),
            "category_id": int(chance.choice([1, 7])),
            "bbox": [*chance.uniform(0, 30, 2).tolist(), *chance.uniform(2, 40, 2).tolist()],
            "score": float(chance.random()),
        }
        for _ in range(5000)
    ]
    truth = GroundTruth(place, masks=False)
    one, other = (truth.judge(results, backend)["bbox"].figures for backend in BACKENDS)
    for name in FIGURES:
        assert one[name] == pytest.approx(other[name], abs=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_found(tmp_path, backend):
    place, _ = random_case(tmp_path)
    summaries = GroundTruth(place, masks=True).judge([], backend)
    assert summaries["segm"].figures["AP"] == 0
    assert summaries["bbox"].figures["AR100"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_find_is_minus_one(tmp_path, backend):
    place = locate(write_tree(tmp_path, [annotation(category_id=1)]), "val")
    results = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30], "score": 0.5}]
    found = GroundTruth(place, masks=False).judge(results, backend)["bbox"]
    assert found.per_class == {"cat": pytest.approx(1.0), "dog": -1.0}
    assert found.figures["APl"] == -1.0


def test_a_class_that_only_the_network_has(tmp_path):
    place = locate(write_tree(tmp_path, [annotation(category_id=1)]), "val")
    found = {
        "boxes": torch.tensor([[10.0, 10.0, 30.0, 40.0], [0.0, 0.0, 20.0, 20.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.5, 0.9]),
        "masks": torch.zeros(2, 1, 48, 64),
    }
    results = to_results(found, 1, [1, None, 7], first_label=1)
    assert [result["category_id"] for result in results] == [1]
    truth = GroundTruth(place, masks=False, classes=["cat", "cow", "dog"])
    (summary,) = truth.judge(results).values()
    assert summary.per_class == {"cat": pytest.approx(1.0), "dog": -1.0, "cow": -1.0}


def test_detections_of_an_unknown_image_are_refused(tmp_path):
    place, results = random_case(tmp_path)
    for key in ("image", "category"):
        with pytest.raises(UserError, match=f"{key} 99, which is not in the annotations"):
            GroundTruth(place, masks=False).judge([{**results[0], f"{key}_id": 99}])


def test_an_evaluator_is_looked_for_at_once(tmp_path, monkeypatch):
    place, _ = random_case(tmp_path)
    for name in ("faster_coco_eval", "pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="need faster-coco-eval or pycocotools: pip install"):
        GroundTruth(place, masks=False)


def test_results_in_cocos_format():
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, 2:4, 1:6] = 0.9
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


def test_gathering_on_one_process_sorts_by_image():
    results = [{"image_id": 3}, {"image_id": 1}]
    assert gather(results, Context(torch.device("cpu"))) == [{"image_id": 1}, {"image_id": 3}]


WORKER = """
import json, sys
from pathlib import Path
from utils.system import distributed
from utils.detection.coco_evaluation import GroundTruth, gather
from utils.detection.coco_files import locate
context = distributed.setup("cpu")
root, results = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
mine = [r for r in results if r["image_id"] % context.world_size == context.rank]
found = gather(mine, context)
assert (found is None) != context.is_main
if context.is_main:
    figures = GroundTruth(locate(root, "val"), True).judge(found)
    Path(sys.argv[3]).write_text(json.dumps({k: v.figures for k, v in figures.items()}))
distributed.tear_down()
"""


def test_two_ranks_give_what_one_gives(tmp_path):
    place, results = random_case(tmp_path / "data")
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).resolve().parents[3]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        tmp_path / "worker.py",
        tmp_path / "data",
        tmp_path / "results.json",
        tmp_path / "out.json",
    ]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    one = GroundTruth(place, masks=True).judge(results)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        kind: summary.figures for kind, summary in one.items()
    }

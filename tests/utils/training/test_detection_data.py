"""Order and grouping of a detector's batches, and what is refused before a run."""

import numpy as np
import pytest
import torch
from helpers.coco_trees import annotation, write_tree

from utils.config.detection import DetectionDataSettings, DetectionRecipe
from utils.data.coco import locate
from utils.data.coco_dataset import load_split
from utils.data.loader import Loader
from utils.runs.resume import Start
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.training.detection_data import (
    GroupedBatches,
    evaluation_batches,
    match_classes,
    open_detection_data,
    training_batches,
)

SIZES = np.array([(48, 64), (64, 48), (50, 50)] * 9)  # tall is every third
CPU = Loader(torch.device("cpu"), workers=0)
CONTEXT = Context(torch.device("cpu"))


def epoch_of(batches, epoch, step=0):
    batches.seek(epoch, step)
    return [[index for _, index in batch] for batch in batches]


def test_a_batch_is_of_one_shape():
    batches = GroupedBatches(SIZES, 4, seed=0)
    for epoch in range(5):
        order = epoch_of(batches, epoch)
        assert len(order) == batches.steps == 6
        assert len({i for batch in order for i in batch}) == 24  # none twice
        tall = [{i % 3 == 1 for i in batch} for batch in order]
        assert sum(len(kinds) == 2 for kinds in tall) <= 1
    assert epoch_of(batches, 0) != epoch_of(batches, 1)


def test_every_image_has_its_turn():
    seen = set()
    batches = GroupedBatches(SIZES, 8, seed=1)
    for epoch in range(12):
        seen |= {i for batch in epoch_of(batches, epoch) for i in batch}
    assert seen == set(range(27))


def test_ranks_share_the_same_global_batches():
    whole = epoch_of(GroupedBatches(SIZES, 6, seed=3), 2)
    shares = [epoch_of(GroupedBatches(SIZES, 6, 3, rank, 3), 2) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == whole


def test_an_epoch_goes_on_in_the_middle():
    batches = GroupedBatches(SIZES, 4, seed=5)
    assert epoch_of(batches, 1, step=2) == epoch_of(batches, 1)[2:]


def test_training_batches(tmp_path):
    boxes = [annotation(1, 1, 1), annotation(2, 3, 7)]
    split = load_split(locate(write_tree(tmp_path, boxes, images=4), "val"), masks=True)
    order = GroupedBatches(split.sizes, 2, seed=0)
    passes = training_batches(split, order, 1, DetectionRecipe(hflip=0.0), 0, CPU)
    batches = list(passes())
    assert sorted(i for batch in batches for i in batch.image_ids) == [1, 2, 3, 4]
    for batch in batches:
        for image, target, image_id in zip(
            batch.images, batch.targets, batch.image_ids, strict=True
        ):
            assert image.dtype == torch.float32
            assert 0 <= image.min() <= image.max() <= 1
            assert target["labels"].tolist() == {1: [1], 3: [2]}.get(image_id, [])
            assert target["masks"].shape[1:] == image.shape[1:]
    passes = training_batches(split, order, 1, DetectionRecipe(min_size=(32, 48)), 0, CPU)
    assert {target["min_size"] for batch in passes() for target in batch.targets} == {32, 48}


def test_evaluation_sees_each_image_once_over_all_ranks(tmp_path):
    split = load_split(locate(write_tree(tmp_path, [], images=5), "val"))
    seen = []
    for rank in range(3):
        for batch in evaluation_batches(split, 1, CPU, rank, 3)():
            assert len(batch.images) == 1
            seen += batch.image_ids
    assert sorted(seen) == [1, 2, 3, 4, 5]


def test_a_broken_image_ends_the_run_with_its_name(tmp_path):
    split = load_split(locate(write_tree(tmp_path, []), "val"))
    (tmp_path / "val2017" / "picture-2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"picture-2\.png"):
        list(evaluation_batches(split, 1, CPU)())


def test_classes_are_matched_by_name(tmp_path):
    split = load_split(locate(write_tree(tmp_path, []), "val"))
    assert match_classes(["dog", "cat"], split, "x") == [7, 1]
    assert match_classes(["dog", "cow", "cat"], split, "x") == [7, None, 1]
    with pytest.raises(UserError, match="x 2, and they differ in cat"):
        match_classes(["dog", "cow"], split, "x")
    with pytest.raises(UserError, match="differ in a name twice"):
        match_classes(["dog", "cat", "cat"], split, "x")


def opened(root, arch):
    recipe = DetectionRecipe(arch=arch, batch_size=1)
    return open_detection_data(DetectionDataSettings(str(root)), recipe, Start(), CONTEXT)


@pytest.mark.parametrize(("arch", "objects"), [("faster_rcnn", 2), ("mask_rcnn", 1)])
def test_masks_are_read_where_they_train(tmp_path, arch, objects):
    """An object without one is of use to the other detectors."""
    entries = [annotation(), annotation(2, 2, segmentation=None)]
    for part in ("train", "val"):
        write_tree(tmp_path, entries, part=part)
    data = opened(tmp_path, arch)
    assert len(data.train.labels) == objects
    assert data.val.masks == (data.train.masks is not None) == (arch == "mask_rcnn")


def test_other_objects_are_other_data(tmp_path):
    """A resumption compares names, boxes and labels."""
    entries = {"same": {}, "again": {}, "box": {"bbox": (9, 10, 20, 30)}}
    entries["label"] = {"category_id": 7}
    digests = {}
    for name, changes in entries.items():
        for part in ("train", "val"):
            write_tree(tmp_path / name, [annotation(**changes)], part=part)
        digests[name] = opened(tmp_path / name, "retinanet").digest
    assert digests["same"] == digests.pop("again")
    assert len({*digests.values()}) == 3

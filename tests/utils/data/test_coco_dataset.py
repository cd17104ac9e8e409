"""A COCO split: classes, targets, mirroring, images that are not as it says."""

import torch
from helpers.coco_trees import annotation, split_of
from PIL import Image

from utils.data.coco_dataset import CocoDataset, mirror
from utils.data.decoding import BrokenImageError


def test_classes_and_ids_come_from_the_file(tmp_path):
    split = split_of(tmp_path, [annotation(category_id=7, image_id=2)])
    assert split.classes == ["cat", "dog"]
    assert split.category_ids == [1, 7]
    assert split.labels.tolist() == [1]
    assert split.starts.tolist() == [0, 0, 1, 1]
    image, target, image_id = CocoDataset(split, first_label=1)[(0, 1)]
    assert image.shape == (3, 48, 64)
    assert image.dtype == torch.uint8
    assert image_id == 2
    assert target["boxes"].tolist() == [[10, 10, 30, 40]]
    assert target["labels"].tolist() == [2]
    expected = torch.zeros(48, 64, dtype=torch.uint8)
    expected[10:40, 10:30] = 1
    assert torch.equal(target["masks"], expected[None])
    assert split.report("val")[0] == (
        "val: 3 images, 2 of them without objects, 1 object of 2 classes"
    )


def test_an_image_without_objects_has_an_empty_target(tmp_path):
    split = split_of(tmp_path, [annotation()])
    _, target, _ = CocoDataset(split, 1)[(0, 2)]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 48, 64)


def test_images_without_objects_are_dropped_on_request(tmp_path):
    split = split_of(tmp_path, [annotation(), annotation(2, 3, 7)], drop_empty=True)
    assert split.image_ids == [1, 3]
    _, target, image_id = CocoDataset(split, 0)[(0, 1)]
    assert image_id == 3
    assert target["labels"].tolist() == [1]
    assert target["masks"].sum() == 600


def test_boxes_are_clipped_and_need_no_masks(tmp_path):
    entry = annotation(bbox=(-5, 40, 100, 100), segmentation=None)
    split = split_of(tmp_path, [entry], masks=False)
    assert split.boxes.tolist() == [[0, 40, 64, 48]]
    assert "masks" not in CocoDataset(split, 1)[(0, 0)][1]


def test_an_image_of_another_size_is_named(tmp_path):
    split = split_of(tmp_path, [annotation()])
    Image.new("RGB", (48, 64)).save(tmp_path / "val2017" / "picture-1.png")
    sample = CocoDataset(split, 1)[(0, 0)]
    assert isinstance(sample, BrokenImageError)
    assert "picture-1.png: 48x64 pixels, but 64x48 in the annotations" in str(sample)
    (tmp_path / "val2017" / "picture-2.png").write_bytes(b"no picture")
    assert "picture-2.png" in str(CocoDataset(split, 1)[(0, 1)])


def test_mirroring_moves_box_and_mask_together():
    mask = torch.zeros(1, 6, 10, dtype=torch.uint8)
    mask[0, 1:4, 2:5] = 1
    target = {"boxes": torch.tensor([[2.0, 1.0, 5.0, 4.0]]), "masks": mask}
    flipped = mirror(target, 10)
    x1, y1, x2, y2 = map(int, flipped["boxes"][0])
    assert flipped["masks"][0, y1:y2, x1:x2].all()
    assert flipped["masks"].sum() == 9
    assert torch.equal(mirror(flipped, 10)["boxes"], target["boxes"])


def test_mirroring_depends_on_epoch_and_index_alone(tmp_path):
    split = split_of(tmp_path, [annotation()], images=8)
    dataset = CocoDataset(split, 1, hflip=0.5, seed=3)
    keys = [(epoch, index) for epoch in range(8) for index in range(8)]
    first = [dataset[key][0] for key in keys]
    again = [dataset[key][0] for key in reversed(keys)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    plain = CocoDataset(split, 1)
    flips = torch.tensor([not torch.equal(dataset[key][0], plain[key][0]) for key in keys])
    by_epoch = flips.reshape(8, 8)
    assert 20 < flips.sum() < 44
    assert len(by_epoch.unique(dim=0)) == 8  # each epoch draws anew
    assert len(by_epoch.unique(dim=1)) == 8  # and each image for itself
    rarely = CocoDataset(split, 1, hflip=0.1, seed=3)
    rare = [not torch.equal(rarely[key][0], plain[key][0]) for key in keys]
    assert 1 <= sum(rare) < 14


def test_a_size_is_drawn_for_each_image_by_epoch_and_index_alone(tmp_path):
    split = split_of(tmp_path, [annotation()], images=8)
    keys = [(epoch, index) for epoch in range(8) for index in range(8)]

    def drawn(seed: int = 3, sizes=(32, 40, 48), hflip: float = 0.5, order=keys) -> list[int]:
        dataset = CocoDataset(split, 1, hflip, seed, sizes)
        return [dataset[key][1].get("min_size") for key in order]

    sizes = drawn()
    assert drawn(order=keys[::-1])[::-1] == sizes != drawn(seed=4)
    assert all(10 < sizes.count(size) < 33 for size in (32, 40, 48))
    by_epoch = [tuple(sizes[i : i + 8]) for i in range(0, 64, 8)]
    assert len(set(by_epoch)) == 8
    assert drawn(sizes=(48,)) == [None] * 64
    plain, several = CocoDataset(split, 1, 0.5, 3), CocoDataset(split, 1, 0.5, 3, (32, 40))
    assert all(torch.equal(plain[key][0], several[key][0]) for key in keys)  # the same mirrored

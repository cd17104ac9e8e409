"""What a detector finds in images of any size, in the file's pixels; and its picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from utils.inspection.predictions import (
    CocoDocument,
    ImageObjects,
    find_images,
    find_objects,
    picture,
)


def test_large_pictures_are_shrunk_with_their_objects():
    image = torch.zeros(3, 500, 2000, dtype=torch.uint8)
    objects = {
        "boxes": torch.tensor([[200.0, 100.0, 1000.0, 400.0]]),
        "labels": torch.tensor([0]),
        "scores": torch.tensor([0.9]),
        "masks": torch.zeros(1, 1, 500, 2000),
    }
    drawn = picture(ImageObjects("x", (500, 2000), image, objects), ["ant"], 0.5)
    assert drawn.size == (1000, 250)
    ys, xs = np.asarray(drawn).max(2).nonzero()
    assert (xs.min(), xs.max(), ys.max()) == (100, 500, 200)  # the caption stands above the box
    small = ImageObjects("x", (8, 40), image[:, :8, :40], objects)
    assert picture(small, ["ant"], 0.95).size == (320, 64)


def test_photographs_larger_than_the_input(tmp_path):
    """They are reduced for the network; the document speaks of the file's pixels."""
    Image.new("RGB", (480, 240), "white").save(tmp_path / "a.png")
    seen = []

    def detector(images):
        seen.append(images[0])
        masks = torch.zeros(1, 1, 50, 100)
        masks[..., 10:30, 20:60] = 1
        boxes = torch.tensor([[20.0, 10.0, 60.0, 30.0]])
        labels, scores = torch.tensor([1]), torch.tensor([0.9])
        return [{"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}]

    detector.transform = SimpleNamespace(max_size=100)
    paths = [str(tmp_path / "a.png").encode()]
    (image,) = find_objects(detector, paths, torch.device("cpu"), first_label=1)
    assert seen[0].shape == (3, 50, 100)
    assert seen[0].eq(1).all()
    assert image.size == (240, 480)
    document = CocoDocument(["ant"], [7])
    document.add(image)
    (entry,), (annotation,) = document.images, document.annotations
    assert (entry["height"], entry["width"]) == (240, 480)
    assert annotation["bbox"] == pytest.approx([96, 48, 192, 96])
    assert annotation["segmentation"]["size"] == [240, 480]
    assert annotation["area"] == pytest.approx(192 * 96, rel=0.02)


@pytest.mark.parametrize(
    "fault",
    [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), None],
    ids=["device", "cpu", "another"],
)
def test_an_image_that_does_not_fit_into_memory_is_passed_over(photos, fault):
    def detector(images):
        raise fault or RuntimeError("size mismatch")

    detector.transform = SimpleNamespace(max_size=100)
    paths = find_images([str(photos / "*.png")])
    if fault is None:
        with pytest.raises(RuntimeError, match="size mismatch"):
            list(find_objects(detector, paths, torch.device("cpu"), first_label=1))
        return
    images = list(find_objects(detector, paths, torch.device("cpu"), first_label=1))
    assert [image.error for image in images] == ["out of memory", "not an image"]

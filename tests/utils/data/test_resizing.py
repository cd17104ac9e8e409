"""The evaluation's resize and crop: torchvision's pixels, bit for bit, without its import."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.trees import ROOT, write_tree
from PIL import Image
from torchvision.transforms import v2

from utils.data.transforms import eval_transform

SIDES = [(500, 375), (375, 500), (64, 64), (28, 28), (5, 60), (33, 20), (224, 256), (1, 1)]
SIZES = [(224, 0.875), (64, 1), (31, 0.85), (40, 1.25), (7, 0.3)]  # 1.25: a black frame around it


def random_image(height: int, width: int, channels_last: bool) -> torch.Tensor:
    chance = torch.Generator().manual_seed(height)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=chance)
    image = pixels.permute(2, 0, 1)  # as a decoder gives it
    return image if channels_last else image.contiguous()


@pytest.mark.parametrize("capability", [None, "DEFAULT"])  # torchvision then resizes in float32
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize(("img_size", "crop_pct"), SIZES)
def test_pixels_are_torchvisions(
    height, width, img_size, crop_pct, channels_last, capability, monkeypatch
):
    if capability is not None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    image = random_image(height, width, channels_last)
    theirs = v2.Compose([v2.Resize(round(img_size / crop_pct)), v2.CenterCrop(img_size)])
    assert torch.equal(eval_transform(img_size, crop_pct)(image), theirs(image))


@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize(("img_size", "crop_pct"), SIZES)
def test_pixels_of_pil_images_are_torchvisions(height, width, img_size, crop_pct):
    image = Image.fromarray(random_image(height, width, True).permute(1, 2, 0).numpy())
    theirs = v2.Compose([v2.Resize(round(img_size / crop_pct)), v2.CenterCrop(img_size)])
    assert np.array_equal(eval_transform(img_size, crop_pct)(image), theirs(image))


def run_program(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("decoder", "suffix"), [("torchvision", "png"), ("pil", "jpg"), ("simplejpeg", "jpg")]
)
def test_one_picture_is_read_without_torchvision(tmp_path, decoder, suffix):
    """Importing it takes half as long as torch, and who asks for one picture would wait for it."""
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(path)
    run_program(f"""
import sys, torch
from utils.data.user_images import read_batches
[batch] = read_batches([{str(path).encode()!r}], 32, 1.0, 1, torch.device("cpu"), 0, {decoder!r})
assert batch.images.shape == (1, 3, 32, 32), batch.broken
assert "torchvision" not in sys.modules
""")


def test_workers_find_torchvision_imported(tmp_path):
    """Else each of them would import it, with memory of its own."""
    write_tree(tmp_path, train=1, val=2)
    run_program(f"""
import sys, torch
from utils.data.image_folder import scan
from utils.data.loading import ImageDataset, Reading, validation_order
from utils.data.transforms import eval_transform
assert "torchvision" not in sys.modules
images = scan({str(tmp_path / "val")!r})
reading = Reading(torch.device("cpu"), workers=1)
reading.batches(ImageDataset(images, eval_transform(32, 1.0)), validation_order(len(images), 2))
assert "torchvision" in sys.modules
""")
    path = str(tmp_path / "val" / "a" / "0.png").encode()
    run_program(f"""
import sys, torch
from utils.data.user_images import read_batches
assert "torchvision" not in sys.modules
[batch] = read_batches([{path!r}], 32, 1.0, 1, torch.device("cpu"), 1)
assert "torchvision" in sys.modules
""")

"""batch.png and predictions.png: what the network got, and what it made of it."""

import numpy as np
import pytest
import torch
from helpers.coco_trees import NETWORK
from helpers.small_runs import SMALL
from PIL import Image

import models
from tools import show_batch
from utils.data.image_folder import scan
from utils.data.loader import ImageDataset
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from utils.inspection import drawing
from utils.runs import checkpoint
from utils.system.style import WRONG
from utils.training import classification

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def grids(monkeypatch):
    """The pictures of each grid that is drawn."""
    drawn = []
    for module in (classification, drawing):
        draw = module.draw_grid
        monkeypatch.setattr(
            module, "draw_grid", lambda cells, *a, draw=draw: drawn.append(cells) or draw(cells, *a)
        )
    return drawn


@pytest.mark.parametrize("mixing", [(), ("--mixup", 0.4, "--cutmix", 1)])
def test_pictures_are_what_a_network_gets(call, tree, tmp_path, monkeypatch, grids, mixing):
    seen, make = [], classification.make_mix

    def watched(*arguments):
        mix = make(*arguments)
        return lambda x, y: seen.append(mix(x, y)) or seen[-1]

    monkeypatch.setattr(classification, "make_mix", watched)
    flags = ("--epochs", 1, "--random-erasing", 0.5, *mixing, "--output", "run", "--seed", 3)
    assert call(*SMALL, *flags, tree)[0] == 0
    few, (images, targets) = seen[:2]  # of the picture, and of the first step
    batch, predictions = grids
    assert len(batch) == len(images) == len(few[0]) - 1
    torch.testing.assert_close(few[0][1:], images, rtol=0, atol=1e-6)
    torch.testing.assert_close(few[1][1:], targets)
    pictures = classification._as_pictures(images, Preprocessing())
    for cell, image, target in zip(batch, pictures, targets, strict=True):
        np.testing.assert_array_equal(np.asarray(cell.image), np.asarray(image))
        shares = target if mixing else torch.eye(3)[target]
        text = f"{cell.label} {cell.note}"
        for name, share in zip("abc", shares.tolist(), strict=True):
            assert (name in text) == (share > 0)
            assert f"{name} {100 * share:.0f} %" in text or share in (0, 1)

    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    network = models.create_model(saved["arch"], num_classes=3)
    network.load_state_dict(saved["state_dict"])
    val = scan(str(tree / "val"))
    dataset = ImageDataset(val, Preprocessing(saved["img_size"], saved["crop_pct"]))
    assert len(predictions) == len(val) == 15
    for i, cell in enumerate(predictions):
        pixels, label, _ = dataset[(0, i)]
        np.testing.assert_array_equal(np.asarray(cell.image), pixels.permute(1, 2, 0).numpy())
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            shares = network.eval()(((pixels / 255 - mean) / std)[None]).softmax(1)[0]
        right = int(shares.argmax()) == label
        assert cell.label == "abc"[int(shares.argmax())]
        assert cell.note.startswith(f"{100 * shares.max():.0f} %")
        assert (cell.colour == WRONG) != right
        assert (f"true: {'abc'[label]}" in cell.note) != right
    for name in ("batch", "predictions"):
        with Image.open(tmp_path / "run" / f"{name}.png") as picture:
            picture.load()


def test_a_batch_is_shown_without_a_training(call, run_folder, tree, tmp_path, monkeypatch):
    code, out, err = call(*SMALL, "--seed", 3, tree, "--output", "look", entry=show_batch.main)
    assert (code, err) == (0, [])
    assert out[-1].startswith("written to look/batch.png: the first batch of a run with --seed 3")
    assert call(*SMALL, "--seed", 3, "--epochs", 1, tree, "--output", "run2")[0] == 0
    shown, trained = ((tmp_path / name / "batch.png").read_bytes() for name in ("look", "run2"))
    assert shown == trained


def test_a_detector_s_batch_has_its_boxes(detect, shapes, tmp_path, grids):
    flags = ("--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
    detect(*NETWORK, *flags, "--epochs", 1, "--seed", 1, "--output", "run", shapes)
    (batch,) = grids
    assert len(batch) == 4
    assert all("object" in cell.note for cell in batch)
    colours = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in drawing.COLOURS}
    for cell in batch:
        pixels = set(map(tuple, np.asarray(cell.image).reshape(-1, 3).tolist()))
        assert (not cell.note.startswith("0 ")) == bool(pixels & colours)
    with Image.open(tmp_path / "run" / "batch.png") as picture:
        picture.load()

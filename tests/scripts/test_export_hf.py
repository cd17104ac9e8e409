"""export.py --to hf: a folder that models.from_pretrained reads, and a card that tells no lies."""

import json

import pytest
import torch
from helpers.classifier_checkpoints import write_checkpoint
from helpers.tiny_runs import RUN

import models
from models import weights
from utils.data.transforms import IMAGENET_MEAN
from utils.runs import checkpoint

pytest.importorskip("safetensors")
ROWS = [
    {"epoch": 0, "lr": 0.1, "val_loss": 1.0, "val_top1": 51.0, "val_top5": 71.0},
    {"epoch": 1, "lr": 0.1, "val_loss": 1.0, "val_top1": 62.125, "val_top5": 83.5},
]


def write(path, step=0, rows=ROWS, classes=("a", "b", "ü | *x*")):
    """A checkpoint of a run; its tensors are returned."""
    run = {name: RUN[name] for name in checkpoint.RUN | {"train_images", "train_digest"}}
    progress = {**RUN["progress"], "epoch": len(rows), "step": step}
    run |= {"progress": progress, "history": rows, "crop_pct": 0.75}
    return write_checkpoint(path, fields={**run, "classes": list(classes)}).state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.usefixtures("thin")
def test_the_folder_is_read_back(export_cli, tmp_path):
    held = write(tmp_path / "best.pth")
    code, text = export_cli("best.pth", "--to", "hf")
    assert code == 0, text
    assert "best-hf/config.json and model.safetensors and README.md: " in text
    assert {path.name for path in (tmp_path / "best-hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert same(models.from_pretrained("best-hf").state_dict(), held)
    config = json.loads((tmp_path / "best-hf" / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == ["a", "b", "ü | *x*"]
    assert (config["img_size"], config["crop_pct"]) == (48, 0.75)
    assert config["mean"] == list(IMAGENET_MEAN)
    # The scripts read its weights as those of any checkpoint.
    loaded = checkpoint.load(tmp_path / "best-hf" / "model.safetensors")
    assert same(weights.network_from_checkpoint(loaded).state_dict(), held)

    code, text = export_cli("best.pth", "--to", "hf")
    assert code == 2
    assert "config.json: is there already" in text
    code, text = export_cli("best.pth", "--to", "hf", "safetensors", "--output", "new/place")
    assert code == 0, text
    assert (tmp_path / "new" / "place" / "best.safetensors").is_file()
    assert same(models.from_pretrained("new/place/best-hf").state_dict(), held)


def card(export_cli, tmp_path, name="x", **kwargs):
    write(tmp_path / f"{name}.pth", **kwargs)
    code, text = export_cli(f"{name}.pth", "--to", "hf")
    assert code == 0, text
    return (tmp_path / f"{name}-hf" / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_run(export_cli, tmp_path):
    text = card(export_cli, tmp_path)
    assert text.startswith("---\nlicense: mit\n")
    for line in (
        "| Architecture | eca_resnet18 |",
        "| ECA's kernel sizes k | 3, 5, 7, 7 |",
        "| Parameters | 11,178,095 |",  # 11,689,556 less the 997 classes' 512 weights and a bias
        "| Licence | MIT |",
        "Top-1 62.12 %, top-5 83.50 % on the run's own validation images, after epoch 2. The "
        "checkpoint does not say whose images those are.",
    ):
        assert line in text
    assert "scaled to 64 pixels (bilinear), the middle 48 × 48" in " ".join(text.split())


@pytest.mark.usefixtures("thin")
def test_weights_saved_within_an_epoch_have_no_figures(export_cli, tmp_path):
    text = card(export_cli, tmp_path, step=7)
    assert "62.12" not in text
    assert "holds no figures of these weights" in text

"""predict.py with a detector: its objects in tables, pictures and COCO's format."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.detection.detectors import create_detector, describe_detector
from utils.data.decoding import read_image
from utils.runs import checkpoint


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A checkpoint of a small Mask R-CNN, as detect_main.py writes it."""
    torch.manual_seed(0)
    settings = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.3, "width": 16}
    network = create_detector("mask_rcnn", "resnet18", num_classes=3, norm="bn", **settings)
    path = tmp_path_factory.mktemp("detector") / "best.pth"
    state = {**describe_detector(network), "classes": ["ant", "bee"], "category_ids": [7, 3]}
    checkpoint.save(path, {**state, "state_dict": network.state_dict()})
    return path, network.eval()


def test_detector_finds_draws_and_writes_coco(detector, photos, predict_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    path, network = detector
    code, table, notes = predict_cli(
        path, photos, "--output", tmp_path / "out", "--min-score", 0.4, "--grid"
    )
    assert code == 1
    assert "mask_rcnn on resnet18, 2 classes" in notes
    assert f"! {photos}/bad.png: not an image; passed over" in notes
    out = tmp_path / "out"
    written = ["detections.csv", "detections.json", "grid.png", "pictures"]
    assert sorted(p.name for p in out.iterdir()) == written
    document = json.loads((out / "detections.json").read_text())
    assert document["categories"] == [{"id": 7, "name": "ant"}, {"id": 3, "name": "bee"}]
    files = [photos / name for name in ("a.png", "b.jpg", "cat/c.png", "cat/d[1].png")]
    assert [image["file_name"] for image in document["images"]] == list(map(str, files))
    assert [line.split()[0] for line in table.splitlines()] == list(map(str, files))
    assert document["annotations"]
    for i, (file, image) in enumerate(zip(files, document["images"], strict=True)):
        pixels = read_image(file)
        assert (image["height"], image["width"]) == tuple(pixels.shape[1:])
        with torch.no_grad():
            (expected,) = network([pixels.float() / 255])
        found = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        assert [a["score"] for a in found] == pytest.approx(expected["scores"].tolist(), abs=1e-4)
        ids = [{1: 7, 2: 3}[label] for label in expected["labels"].tolist()]
        assert [a["category_id"] for a in found] == ids
        for annotation, box in zip(found, expected["boxes"].tolist(), strict=True):
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == pytest.approx(box, abs=0.05)
            assert annotation["segmentation"]["size"] == list(pixels.shape[1:])
        told = table.splitlines()[i].count("ant") + table.splitlines()[i].count("bee")
        assert told == sum(a["score"] >= 0.4 for a in found)
        drawn = np.asarray(Image.open(out / "pictures" / f"{i + (i > 1) + 1:04}_{file.stem}.png"))
        assert max(drawn.shape[:2]) >= 200  # small images are enlarged, so that one can read
    rows = list(csv.DictReader((out / "detections.csv").read_text().splitlines()))
    assert len(rows) == len(document["annotations"])
    assert {row["class"] for row in rows} <= {"ant", "bee"}

    # COCO's own tools read the document.
    tools = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):  # they narrate
        coco = tools.COCO(str(out / "detections.json"))
    annotation = document["annotations"][0]
    mask = coco.annToMask(coco.loadAnns([annotation["id"]])[0])
    assert mask.sum() == annotation["area"]

    code, text, _ = predict_cli(
        path, photos / "a.png", "--format", "json", "--output", tmp_path / "two"
    )
    assert code == 0
    assert json.loads(text)["images"][0]["file_name"] == f"{photos}/a.png"
    for flag in (("--maps",), ("--img-size", 64), ("--names", "x"), ("--topk", 3), ("--fast",)):
        code, _, notes = predict_cli(path, photos, *flag)
        assert code == 2
        assert f"{flag[0]} is for classifiers, and {path} holds a detector: leave it out" in notes
    assert not torch.backends.cudnn.benchmark  # each image has a shape of its own

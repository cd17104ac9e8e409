"""predict.py: the right images, the right numbers, and pictures of what the network saw."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.small_runs import thin_networks
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

import predict
from models import create_model, weights
from models.eca_resnet import BasicBlock, ResNet
from models.inference import fastest_dtype
from utils.data.decoding import read_image
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from utils.inspection.predictions import find_images, read_batches
from utils.runs import checkpoint

CLASSES = ["cat", "dog", "emu"]


pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    with thin_networks():
        network = create_model("eca_resnet18", num_classes=3).eval()
    nn.init.normal_(network.fc.weight)
    path = tmp_path_factory.mktemp("ckpt") / "best.pth"
    fields = {"classes": CLASSES, "img_size": 64, "crop_pct": 0.8}
    state = {**weights.describe_network(network), **fields, "state_dict": network.state_dict()}
    checkpoint.save(path, state)
    return path, network


def expected_confidences(network, path):
    """By hand, from the file to the softmax."""
    image = read_image(path)
    image = tv.center_crop(tv.resize(image, [80], antialias=True), [64]).float() / 255
    image = tv.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        return network(image[None]).softmax(1)[0]


def test_table_csv_and_json_hold_the_right_numbers(
    ckpt, photos, predict_cli, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    path, network = ckpt
    out = tmp_path / "out"
    code, table, notes = predict_cli(path, photos, "-k", 2, "-b", 2, "--output", out)
    assert code == 1
    assert f"! {photos}/bad.png: not an image; passed over" in notes
    assert "1 of 5 images could not be read" in notes
    found = json.loads((out / "predictions.json").read_text())
    names = ("a.png", "b.jpg", "bad.png", "cat/c.png", "cat/d[1].png")
    assert [entry["file"] for entry in found] == [f"{photos}/{name}" for name in names]
    assert found.pop(2) == {"file": f"{photos}/bad.png", "error": "not an image"}
    lines = table.splitlines()
    assert len(lines) == 4
    for entry, line in zip(found, lines, strict=True):
        expected = expected_confidences(network, entry["file"])
        order = expected.argsort(descending=True)[:2].tolist()
        assert [guess["index"] for guess in entry["guesses"]] == order
        assert [guess["name"] for guess in entry["guesses"]] == [CLASSES[i] for i in order]
        given = torch.tensor([guess["confidence"] for guess in entry["guesses"]])
        torch.testing.assert_close(given, expected[order], rtol=1e-3, atol=1e-4)
        assert line.startswith(entry["file"])
        assert f"{CLASSES[order[0]]} {100 * given[0]:.1f} %" in line

    code, text, _ = predict_cli(path, photos, "-k", 2, "-b", 2, "--format", "csv")
    assert text == (out / "predictions.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert rows[2]["error"] == "not an image"
    assert rows[0]["class_1"] == found[0]["guesses"][0]["name"]
    # Of a list on standard input, what has gone meanwhile is broken like the others.
    lines = [f"{photos}/{name}\n".encode() for name in ("gone.png", "a.png")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=lines))
        code, table, notes = predict_cli(path, "-")
    assert (code, [line.split()[0] for line in table.splitlines()]) == (1, [f"{photos}/a.png"])
    assert f"! {photos}/gone.png: No such file or directory; passed over" in notes
    assert "1 of 2 images could not be read" in notes

    code, text, _ = predict_cli(path, photos / "a.png", "-k", 9, "--format", "json")
    assert code == 0
    (entry,) = json.loads(text)
    assert sum(guess["confidence"] for guess in entry["guesses"]) == pytest.approx(1)
    assert torch.backends.cudnn.benchmark  # as evaluation has it


@pytest.mark.parametrize("amp", [None, "off", "bf16"])
def test_fast_predicts_the_same(ckpt, photos, predict_cli, amp):
    path, network = ckpt
    flags = ("--fast", "--amp", amp) if amp else ("--fast",)
    code, text, notes = predict_cli(path, photos, "--format", "json", *flags)
    assert code == 1
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32 if amp else fastest_dtype("cpu")
    assert f"rebuilt for inference: BatchNorm folded, weights in {dtype}" in notes
    near = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05}
    found = [entry for entry in json.loads(text) if "error" not in entry]
    assert len(found) == 4
    for entry in found:
        confidences = torch.zeros(3)
        for guess in entry["guesses"]:
            confidences[guess["index"]] = guess["confidence"]
        expected = expected_confidences(network, entry["file"])
        torch.testing.assert_close(confidences, expected, **near)


def test_pictures_go_to_a_new_folder(ckpt, photos, predict_cli, tmp_path, monkeypatch):
    path, network = ckpt
    monkeypatch.chdir(tmp_path)
    code, _, notes = predict_cli(path, photos, "--maps", "--grid")
    assert code == 1
    assert "maps of layer3: of 64 pixels layer4 keeps too few positions" in notes
    folder = tmp_path / "runs" / "predict-1"
    written = ["grid.png", "maps", "predictions.csv", "predictions.json"]
    assert sorted(p.name for p in folder.iterdir()) == written
    names = ["0001_a.png", "0002_b.png", "0004_c.png", "0005_d[1].png"]
    assert sorted(p.name for p in (folder / "maps").iterdir()) == names
    maps = [e["map"] for e in json.loads((folder / "predictions.json").read_text()) if "map" in e]
    assert maps == [f"runs/predict-1/maps/{name}" for name in names]
    grid = np.asarray(Image.open(folder / "grid.png").convert("RGB")).reshape(-1, 3).tolist()
    # c and d lie in a folder named like a class: each has a frame that says whether it is right.
    frames = [[0x1A, 0x7F, 0x37], [0xCF, 0x22, 0x2E]]
    hits = [
        expected_confidences(network, photos / "cat" / name).argmax() == 0
        for name in ("c.png", "d[1].png")
    ]
    assert [frame in grid for frame in frames] == [any(hits), not all(hits)]

    predict_cli(path, photos / "a.png", "--maps", "--map-stage", 4)
    assert (tmp_path / "runs" / "predict-2" / "maps" / "0001_a.png").stat().st_size > 5000
    code, _, notes = predict_cli(path, photos / "a.png", "--output", folder)
    assert (code, "is in use; choose a new --output" in notes) == (2, True)


def test_released_weights(ckpt, photos, predict_cli, tmp_path):
    _, network = ckpt
    released = tmp_path / "released.pth.tar"
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "wrong", "state_dict": state}, released)
    code, table, notes = predict_cli(released, photos / "a.png")
    assert (code, "class 0 " in table) == (0, True)
    assert "the middle 224 of 256 pixels" in notes
    names = tmp_path / "names.txt"
    names.write_text("n1\nn2\n\nn3\n")
    options = ("--names", names, "--img-size", 64, "--crop-pct", 0.8, "--format", "json")
    _, text, _ = predict_cli(released, photos / "a.png", *options)
    guesses = json.loads(text)[0]["guesses"]
    given = {guess["name"]: guess["confidence"] for guess in guesses}
    expected = expected_confidences(network, photos / "a.png")
    assert [given[f"n{i}"] for i in (1, 2, 3)] == pytest.approx(expected.tolist(), abs=1e-4)


def test_odd_names_of_files(ckpt, photos, predict_cli, tmp_path):
    """As long as a file system takes, and in two lines."""
    path, _ = ckpt
    names = ["ä" * 125 + ".png", "two\nlines.png"]
    for name in names:
        (tmp_path / name).write_bytes((photos / "a.png").read_bytes())
    flags = ("--maps", "--grid", "--output", tmp_path / "out")
    code, table, _ = predict_cli(path, *(tmp_path / name for name in names), *flags)
    assert code == 0
    assert len(table.splitlines()) == 2
    assert "two\\x0alines.png" in table
    maps = {p.name for p in (tmp_path / "out" / "maps").iterdir()}
    assert maps == {"0001_" + "ä" * 100 + ".png", "0002_two\\x0alines.png"}
    assert (tmp_path / "out" / "grid.png").exists()


def test_what_is_wrong_is_said_in_one_line(ckpt, photos, predict_cli, tmp_path):
    path, _ = ckpt
    (tmp_path / "two.txt").write_text("a\nb\n")
    for arguments, message in [
        ((path, "nowhere.jpg"), "nowhere.jpg: no such file, folder or pattern"),
        ((photos / "a.png", photos), "damaged, or not a checkpoint"),
        ((path, photos, "--names", tmp_path / "two.txt"), "2 names for 3 classes"),
        ((path, photos, "--maps", "--map-stage", 5), "has feature maps 1 to 4"),
        ((path, photos, "--amp", "off"), "--amp says in what --fast computes: add --fast"),
        ((path, photos, "--fast", "--maps"), "--maps takes gradients, which --fast leaves no"),
        ((path, photos, "--min-score", 0.4), "--min-score is for detectors, and"),
    ]:
        code, out, notes = predict_cli(*arguments)
        assert (code, out) == (2, "")
        assert message in notes
        assert len(notes.splitlines()) == 1


def test_a_network_that_gives_no_numbers(photos):
    network = ResNet(BasicBlock, (1, 1, 1, 1), "eca", "3333", num_classes=3).eval()
    nn.init.constant_(network.fc.bias, float("nan"))
    batches = read_batches(
        find_images([str(photos / "a.png")]), Preprocessing(64, 0.8), 2, torch.device("cpu")
    )
    ((_, prediction, heat),) = predict.classify(network, batches, ["a.png"], CLASSES, 2, None)
    assert prediction.error == "the network's output is not finite"
    assert heat is None

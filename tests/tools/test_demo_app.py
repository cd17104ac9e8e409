"""The page of tools.demo_app: what it shows, its server, and a browser where there is one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trees import ROOT
from PIL import Image

import models
from models import weights
from tools import demo_app
from utils.runs import checkpoint
from utils.system.errors import UserError

PATIENCE = 1200  # seconds: for a hang alone
CLASSES = ["cat", "dog", "dog", "<i>owl</i>", "emu", "fox", "gnu"]
with_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = models.create_model("eca_resnet18", num_classes=len(CLASSES))
    fields = {**weights.describe_network(network), "classes": CLASSES, "img_size": 64}
    path = tmp_path_factory.mktemp("saved") / "best.pth"
    fields |= {"crop_pct": 0.875, "state_dict": network.state_dict()}
    checkpoint.save(path, fields)
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    from models.detection.detectors import create_detector, describe_detector

    torch.manual_seed(0)
    settings = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.3, "width": 16}
    network = create_detector("mask_rcnn", "resnet18", num_classes=3, norm="bn", **settings)
    state = {**describe_detector(network), "classes": ["ant", "bee"], "category_ids": [1, 2]}
    path = tmp_path_factory.mktemp("saved") / "detector.pth"
    checkpoint.save(path, {**state, "state_dict": network.state_dict()})
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_classifier_s_answer_is_the_network_s(classifier, photo):
    """Top five against the network called by itself in float64."""
    _, show, _ = demo_app.open_checkpoint(str(classifier), device="cpu")
    ranking, evidence, weights_drawn = show(str(photo))
    assert evidence.size == (448, 336)
    assert weights_drawn.width > 300

    from torchvision.transforms import v2

    network = weights.network_from_checkpoint(checkpoint.load(classifier)).eval()
    steps = [v2.Resize(73), v2.CenterCrop(64), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        image = v2.Compose(steps)(Image.open(photo))[None].double()
        shares = network.double()(image).softmax(1)[0].numpy()
    order = np.argsort(-shares)[:5]
    names = ["cat", "dog (class 1)", "dog (class 2)", *CLASSES[3:]]
    assert list(ranking) == [names[i] for i in order]
    assert list(ranking.values()) == pytest.approx(shares[order], abs=5e-3)


def test_every_block_has_a_row_of_channel_weights(classifier, photo, monkeypatch, figures):
    kept = []
    draw = demo_app.draw_one_image
    monkeypatch.setattr(demo_app, "draw_one_image", lambda x: kept.extend(x) or draw(x))
    demo_app.open_checkpoint(str(classifier), device="cpu")[1](str(photo))
    assert [layer.mean.shape for layer in kept] == [
        (1, c) for c in (64, 128, 256, 512) for _ in "ab"
    ]
    rows = figures[-1].axes
    assert len(rows) == 8
    for axis, layer in zip(rows, kept, strict=True):
        want = layer.mean[0] - layer.mean[0].mean()
        np.testing.assert_allclose(axis.images[0].get_array()[0], want)


def test_a_detector_shows_boxes_from_a_score_on(detector, photo):
    _, show, _ = demo_app.open_checkpoint(str(detector), device="cpu")
    drawn, rows = show(str(photo), 0.3)
    assert drawn.width >= 96
    assert rows
    assert {row[0] for row in rows} <= {"ant", "bee"}
    for row in rows:
        x1, y1, x2, y2 = (float(text) for text in row[2].split(", "))
        assert 0 <= x1 <= x2 <= 120
        assert 0 <= y1 <= y2 <= 90
    assert show(str(photo), 1.0)[1] == []


def test_a_file_that_is_no_image_gets_one_line(classifier, detector, tmp_path):
    file = tmp_path / "<notes>.txt"
    file.write_bytes(b"no image")
    for saved in (classifier, detector):
        _, show, _ = demo_app.open_checkpoint(str(saved), device="cpu")
        with pytest.raises(UserError, match=r"^<notes>\.txt: not an image"):
            show(str(file))


def test_what_does_not_fit_is_refused(classifier, detector, monkeypatch, capsys):
    with pytest.raises(UserError, match="--names is for classifiers"):
        demo_app.open_checkpoint(str(detector), names="x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["demo_app", str(classifier)])
    with pytest.raises(UserError, match=r"needs gradio: pip install -r requirements-demo\.txt"):
        demo_app.main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address):
            return True
    except urllib.error.URLError:
        return False


@pytest.fixture
def served(tmp_path, classifier):
    """The address of the page, whose server ends with the test."""
    out = tmp_path / "stdout"
    files = tmp_path / "temporary"
    files.mkdir()
    with open(out, "w") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.demo_app", str(classifier), "--port", str(free_port())],
            cwd=ROOT,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(files)},
        )
    end = time.monotonic() + PATIENCE
    address = ""
    while not address or not answers(address):
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
        address = out.read_text().partition("open ")[2].partition(" ")[0]
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    assert not list(files.glob("eca-demo-*")), "uploaded files are left"
    assert "Traceback" not in out.read_text()


@with_gradio
def test_the_server_answers(served, photo, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(served, verbose=False, analytics_enabled=False, download_files=str(tmp_path))
    ranking, *pictures = client.predict(handle_file(str(photo)), api_name="/answer")
    assert len(ranking["confidences"]) == 5
    assert [Image.open(picture).width > 300 for picture in pictures] == [True, True]
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(AppError, match=r"bad\.png: not an image"):
        client.predict(handle_file(str(tmp_path / "bad.png")), api_name="/answer")


@with_gradio
@pytest.mark.skipif(
    BROWSER is None or find_spec("playwright") is None, reason="needs chromium and playwright"
)
def test_the_page_in_a_browser(served, photo):
    """It fits, shows its pictures, and asks no other machine for anything."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.goto(served)
        page.locator("input[type=file]").set_input_files(str(photo))
        page.get_by_text("photo.png").first.wait_for()
        page.get_by_role("button", name="Submit").click()
        loaded = "[...document.images].filter(i => i.naturalWidth > 300).length == 2"
        page.wait_for_function(loaded)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert faults == []
        assert all(url.startswith((served, "data:", "blob:")) for url in asked)
        browser.close()

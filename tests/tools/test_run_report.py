"""One page for a run: whole without any other file, and with nothing of a stranger's running."""

import base64
import csv
import io
import json
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.coco_trees import NETWORK
from PIL import Image

from tools import run_report
from utils.data.image_folder import ImageFolder
from utils.inspection.report import EvaluatedImages, write_report
from utils.runs import checkpoint

VOID = {"meta", "img"}
EVIL = '<script>alert("x")</script>'


@pytest.fixture
def write_page(call):
    """Runs the tool: (exit code, lines on stdout, lines on stderr)."""
    return partial(call, entry=run_report.main)


class Page(HTMLParser):
    """Reads a page: that its tags are balanced, its text, its pictures, its links."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.pictures, self.links = [], [], [], []
        self.names, self.tags, self.titles = set(), set(), []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "src":
                head, _, code = value.partition(",")
                assert head == "data:image/png;base64"
                self.pictures.append(base64.b64decode(code, validate=True))
            if name == "href":
                assert value.startswith("#"), value
                self.links.append(value[1:])
            if name == "id":
                assert value not in self.names
                self.names.add(value)
            if name == "style":
                assert "url" not in value
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        elif data.strip():
            self.texts.append(data)
            if self.open[-1] == "h2":
                self.titles.append(data)


def read(path: Path) -> Page:
    """The page, with what holds for every page."""
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "link", "iframe", "object", "form", "base"}
    assert page.links
    assert set(page.links) <= page.names
    for data in page.pictures:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    return page


def report_of(run: Path, names: list[str], data: Path, n: int = 60) -> Path:
    """A report on images of these classes, with chance predictions."""
    chance = np.random.default_rng(0)
    true, predicted = np.arange(n) % len(names), chance.integers(0, len(names), n)
    sure = chance.random(n)
    hits = true == predicted
    images = EvaluatedImages(true, predicted, hits, sure, sure / 2, 1 - sure, len(names))
    paths = np.array([f"c/{i}.png".encode() for i in range(n)])
    folder = ImageFolder(str(data), tuple(names), paths, true)
    record = {"images": n, "top1": 50.0, "top5": 60.0, "loss": 1.5, "data": EVIL}
    return write_report(run, images, folder, "eca_resnet18", {**record, "checkpoint": "best.pth"})


def test_a_run_without_a_report_says_how_to_make_one(write_page, run_folder):
    lines = (run_folder / "metrics.csv").read_text().splitlines()
    code, out, err = write_page(run_folder)
    assert (code, err) == (0, [])
    assert out[-1].startswith(f"written to {run_folder / 'report.html'}")
    page = read(run_folder / "report.html")
    assert page.titles == ["Curves", "Evaluation", "Settings", "Versions"]
    assert (run_folder / "curves.png").read_bytes() in page.pictures
    assert f"-e --resume {run_folder / 'best.pth'}" in page.text
    best = max(csv.DictReader(lines), key=lambda row: float(row["val_top1"]))
    assert f"top-1, % {float(best['val_top1']):.4g} " in page.text
    record = json.loads((run_folder / "args.json").read_text())
    decay = record["recipe"]["weight_decay"]
    for text in (record["environment"]["torch"], "mobilenetv2", f"weight decay {decay}"):
        assert text in page.text


def test_the_newest_report_is_shown(write_page, run_folder, tmp_path):
    report_of(run_folder, ["cat", "dog", "кошка"], tmp_path)
    assert write_page(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    shown = {path.read_bytes() for path in (run_folder / "report").glob("*.png")}
    assert len(shown) == 3  # besides curves.png
    assert shown <= set(page.pictures)
    with open(run_folder / "report" / "classes.csv") as file:
        for row in csv.DictReader(file):
            assert f"{row['class']} {row['support']} {row['predicted']}" in page.text
            assert f" {float(row['f1']):.2f} " in page.text
    report_of(run_folder, ["x", "y", "z"], tmp_path)
    (run_folder / "report-3").mkdir()  # one that was interrupted
    assert write_page(run_folder)[0] == 0
    assert "кошка" not in read(run_folder / "report.html").text


def test_pictures_of_channel_weights_are_those_of_the_run_s_folder(write_page, run_folder):
    record = json.loads((run_folder / "args.json").read_text())
    (run_folder / "args.json").write_text(json.dumps({**record, "ksize": [3, 3]}))
    assert write_page(run_folder)[0] == 0
    assert f"--output {run_folder / 'attention'}" in read(run_folder / "report.html").text
    names = ("channel_weights", "spread", "kernels")
    (run_folder / "attention").mkdir()
    for i, name in enumerate(names):
        Image.new("L", (9, 9), i).save(run_folder / "attention" / f"{name}.png")
    assert write_page(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    drawn = [(run_folder / "attention" / f"{name}.png").read_bytes() for name in names]
    assert set(drawn) <= set(page.pictures)
    assert "visualize_attention.py" not in page.text


@pytest.mark.usefixtures("thin")
def test_a_detector_s_run(write_page, detect, shapes, tmp_path):
    flags = ("--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
    detect(*NETWORK, *flags, "--epochs", 1, "--seed", 1, "--output", "run", shapes)
    code, _, err = write_page("run")
    assert (code, err) == (0, [])
    page = read(tmp_path / "run" / "report.html")
    assert page.titles == ["Curves", "Evaluation", "Settings", "Versions"]
    assert (tmp_path / "run" / "predictions.png").read_bytes() in page.pictures
    saved = checkpoint.load(tmp_path / "run" / "best.pth")
    summary = saved["progress"]["best"]["summaries"]["bbox"]
    for name, value in summary["per_class"].items():
        assert f"{name} {100 * value:.4g}" in page.text or value < 0


def test_names_of_strangers_are_text(write_page, run_folder, tmp_path):
    names = [EVIL, "a & b", '" onload="x', "=1+1", "\x1b[2J", "猫", "</td></table>", "&lt;"]
    report_of(run_folder, names, tmp_path)
    record = json.loads((run_folder / "args.json").read_text())
    record["args"]["data"] = EVIL
    record["environment"][EVIL] = EVIL
    (run_folder / "args.json").write_text(json.dumps(record))
    assert write_page(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    assert page.text.count(EVIL) > 5
    for name in ("a & b", '" onload="x', "=1+1", "\\x1b[2J", "猫", "</td></table>", "&lt;"):
        assert name in page.text


def test_a_foreign_file_stays(write_page, run_folder, tmp_path):
    target = run_folder / "report.html"
    target.write_text("mine")
    code, out, err = write_page(run_folder)
    assert (code, out) == (2, [])
    assert "stays as it is" in err[0]
    assert target.read_text() == "mine"
    assert write_page(run_folder, "--output", tmp_path / "page.html")[0] == 0
    before = (tmp_path / "page.html").read_text()
    assert run_report.MARK in before
    assert write_page(run_folder, "--output", tmp_path / "page.html")[0] == 0  # its own is replaced
    target.unlink()
    target.symlink_to(tmp_path / "page.html")
    code, _, err = write_page(run_folder)
    assert code == 2
    assert "no plain file" in err[0]


def test_files_that_a_run_does_not_write_are_refused(write_page, run_folder, tmp_path):
    folder = report_of(run_folder, ["a", "b"], tmp_path)
    (folder / "classes.csv").unlink()
    code, _, err = write_page(run_folder)
    assert (code, len(err)) == (2, 1)
    assert "classes.csv: No such file or directory; make the report anew" in err[0]

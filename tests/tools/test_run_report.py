"""One page for a run: whole without any other file, and with nothing of a stranger's running."""

import base64
import csv
import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.coco_trees import NETWORK
from helpers.small_runs import SMALL
from PIL import Image

from assembly.evaluation_report import write_report
from tools import run_report
from utils.classification.image_outcomes import ImageOutcomes
from utils.data.image_folder import ImageFolder
from utils.inspection.html_page import MARK
from utils.inspection.svg_curves import Line, chart
from utils.options import parser

VOID = {"meta", "img", "line", "circle", "polyline"}
EVIL = '<script>alert("x")</script>'


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


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Runs the tool in an empty folder: (exit code, lines on stdout, lines on stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parser, "end_children", lambda: True)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_report", *map(str, arguments)])
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            parser.run_script(run_report.main)
        said = [stream.buffer.getvalue().decode().splitlines() for stream in (out, err)]
        return ended.value.code, *said

    return start


def report_of(run: Path, names: list[str], data: Path, images: int = 60) -> Path:
    """A report on images of these classes, with chance outcomes."""
    chance = np.random.default_rng(0)
    n = len(names)
    true, found = np.arange(images) % n, chance.integers(0, n, images)
    sure = chance.random(images)
    outcomes = ImageOutcomes(true, found, true == found, sure, sure / 2, 1 - sure, n)
    paths = np.array([f"c/{i}.png".encode() for i in range(images)])
    folder = ImageFolder(str(data), tuple(names), paths, true)
    told = {"images": images, "top1": 50.0, "top5": 60.0, "loss": 1.5, "data": EVIL}
    return write_report(run, outcomes, folder, "eca_resnet18", {**told, "checkpoint": "best.pth"})


def test_a_run_without_a_report_says_how_to_make_one(write, run_folder):
    code, out, err = write(run_folder)
    assert (code, err) == (0, [])
    assert out[-1].startswith(f"written to {run_folder / 'report.html'}")
    page = read(run_folder / "report.html")
    assert page.titles == ["Curves", "Classes", "Network", "Settings", "Versions"]
    assert f"-e --resume {run_folder / 'best.pth'}" in page.text
    with open(run_folder / "metrics.csv") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["val_top1"]))
    assert f"top-1 {float(best['val_top1']):.2f} %" in page.text
    record = json.loads((run_folder / "args.json").read_text())
    for words in (record["environment"]["torch"], "mobilenetv2", "weight decay 4e-05"[:12]):
        assert words in page.text


def test_a_report_is_shown_whole(write, run_folder, tmp_path):
    report_of(run_folder, ["cat", "dog", "кошка"], tmp_path)
    assert write(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    assert page.titles[1:5] == ["Classes", "Confusions", "Calibration", "Worst images"]
    shown = {path.read_bytes() for path in (run_folder / "report").glob("*.png")}
    assert len(shown) == 3
    assert shown <= set(page.pictures)
    with open(run_folder / "report" / "classes.csv") as file:
        for row in csv.DictReader(file):
            assert f"{row['class']} {row['support']} {row['predicted']}" in page.text
    # The newest of several; one that was interrupted does not count.
    report_of(run_folder, ["x", "y", "z"], tmp_path)
    (run_folder / "report-3").mkdir()
    assert write(run_folder)[0] == 0
    assert "кошка" not in read(run_folder / "report.html").text


def test_names_of_strangers_are_text(write, run_folder, tmp_path):
    names = [EVIL, "a & b", '" onload="x', "=1+1", "\x1b[2J", "猫", "</td></table>", "&lt;"]
    report_of(run_folder, names, tmp_path)
    record = json.loads((run_folder / "args.json").read_text())
    record["args"]["data"] = EVIL
    record["environment"][EVIL] = EVIL
    (run_folder / "args.json").write_text(json.dumps(record))
    assert write(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    assert page.text.count(EVIL) > 5
    for name in ("a & b", '" onload="x', "=1+1", "\\x1b[2J", "猫", "</td></table>", "&lt;"):
        assert name in page.text


def test_a_thousand_classes(write, run_folder, tmp_path):
    names = [f"n{i:08d}" for i in range(1000)]
    report_of(run_folder, names, tmp_path, images=3000)
    assert write(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    assert "All 1,000 classes" in page.text
    assert (run_folder / "report.html").stat().st_size < 3_000_000


def test_one_epoch_and_no_checkpoint(write, run_folder):
    for path in run_folder.glob("*.pth"):
        path.unlink()
    lines = (run_folder / "metrics.csv").read_text().splitlines()
    (run_folder / "metrics.csv").write_text("\n".join(lines[:2]) + "\n")
    code, out, _ = write(run_folder)
    assert code == 0
    assert "holds no checkpoint" in out[0]
    page = read(run_folder / "report.html")
    assert "no kernels to show" in page.text
    assert "1 of 2" in page.text


def test_damaged_checkpoints_leave_a_note(write, run_folder):
    for path in run_folder.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    code, out, _ = write(run_folder)
    assert code == 0
    assert "only damaged checkpoints" in out[0]
    assert read(run_folder / "report.html").pictures == []


def test_eca_s_kernels_are_those_of_the_checkpoint(call, tree, tmp_path, figures, write):
    flags = (*SMALL[2:], "-a", "eca_mobilenetv2", "--epochs", 1, "--output", "run", tree)
    assert call(*flags)[0] == 0
    figures.clear()
    assert write(tmp_path / "run")[0] == 0
    lines = [line for axis in figures[0].axes for line in axis.lines if len(line.get_xdata()) == 3]
    saved = run_report.read_checkpoint(tmp_path / "run")[0]["state_dict"]
    kernels = [t.flatten().tolist() for t in saved.values() if t.ndim == 3]
    drawn = [line.get_ydata().tolist() for line in lines]
    assert kernels
    assert all(kernel in drawn for kernel in kernels if len(kernel) == 3)
    assert "Channel weights need images" in read(tmp_path / "run" / "report.html").text


def test_a_detector_s_run(write, detect, shapes, tmp_path):
    flags = ("--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
    detect(*NETWORK, *flags, "--epochs", 1, "--seed", 1, "--output", "run", shapes)
    code, _, err = write("run")
    assert (code, err) == (0, [])
    page = read(tmp_path / "run" / "report.html")
    assert page.titles == ["Curves", "Classes", "Network", "Settings", "Versions"]
    saved = run_report.read_checkpoint(tmp_path / "run")[0]
    summary = saved["progress"]["best"]["summaries"]["bbox"]
    for name, value in summary["per_class"].items():
        assert f"{name} {100 * value:.1f}" in page.text or value < 0
    assert "Box AP" in page.text
    assert "--report" not in page.text


def test_a_foreign_file_stays(write, run_folder, tmp_path):
    target = run_folder / "report.html"
    target.write_text("mine")
    code, out, err = write(run_folder)
    assert (code, out) == (2, [])
    assert "stays as it is" in err[0]
    assert target.read_text() == "mine"
    assert write(run_folder, "--output", tmp_path / "page.html")[0] == 0
    before = (tmp_path / "page.html").read_text()
    assert MARK in before
    assert write(run_folder, "--output", tmp_path / "page.html")[0] == 0  # its own is replaced
    target.unlink()
    target.symlink_to(tmp_path / "page.html")
    code, _, err = write(run_folder)
    assert code == 2
    assert "no plain file" in err[0]


@pytest.mark.parametrize(
    ("argument", "words"), [("nothing", "give folders of runs"), (".", "metrics.csv")]
)
def test_what_is_no_run_is_refused_in_one_line(write, argument, words):
    code, _, err = write(argument)
    assert code == 2
    assert len(err) == 1
    assert words in err[0]


@pytest.mark.parametrize("epoch", ["inf", "1e300", "nan", "-5"])
def test_numbers_of_strangers_that_cannot_be_are_refused(write, run_folder, epoch):
    head, first, *_ = (run_folder / "metrics.csv").read_text().splitlines()
    rows = [head, first, ",".join([epoch, *first.split(",")[1:]])]
    (run_folder / "metrics.csv").write_text("\n".join(rows))
    code, _, err = write(run_folder)
    assert code == 2
    assert "not what a run writes" in err[0]


def test_what_main_does_not_write_is_refused(write, run_folder, tmp_path):
    folder = report_of(run_folder, ["a", "b"], tmp_path)
    (folder / "confusion.png").write_bytes(b"<svg onload=alert(1)>")
    assert write(run_folder)[0] == 0
    assert "cannot be read as a PNG" in read(run_folder / "report.html").text
    secret = tmp_path / "secret.csv"
    secret.write_text("path\nsecret\n")
    (folder / "worst_images.csv").unlink()
    (folder / "worst_images.csv").symlink_to(secret)
    code, _, err = write(run_folder)
    assert code == 2
    assert len(err) == 1
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "report.json").write_text("[]")
    code, _, err = write(run_folder)
    assert code == 2
    assert "make the report anew" in err[0]


@pytest.mark.parametrize(
    "values",
    [
        *([0.5], [0.0, 0.0], [1e-9, 3.0], [5.0, float("nan"), 6.0], [float("inf")], [], [-3, 1e12]),
        *([1e300, -1e300], [1e12, 1e12 + 1e-4], [5e-324, 1.0], [0.1, 0.1 + 1e-17], [2.0] * 300),
    ],
)
def test_curves_of_awkward_values_stay_inside(values):
    points = [(i + 1, v) for i, v in enumerate(values)]
    source = chart("Loss", "x", [Line(points, EVIL, None)], 1, True)
    page = Page(source)
    assert EVIL in page.text or "no finite value" in page.text
    for name in ("points", "cx", "cy", "x1", "y1", " x", " y"):
        for part in source.split(f'{name}="')[1:]:
            for pair in part.split('"')[0].split():
                for number in pair.split(","):
                    assert -1 <= float(number) <= 400


def test_a_browser_shows_it_without_a_fault(write, run_folder, tmp_path):
    """No request, no message of the browser's, and nothing wider than a phone."""
    browsers = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser")
    report_of(run_folder, [EVIL, "a" * 300, "b c " * 90, "猫"], tmp_path)
    assert write(run_folder)[0] == 0
    said: list[str] = []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for width in (1200, 400):
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.on("console", lambda message: said.append(message.text))
            page.on("request", lambda request: said.append(request.url[:40]))
            page.on("dialog", lambda dialog: said.append(dialog.message))
            page.goto((run_folder / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        browser.close()
    assert [words for words in said if not words.startswith(("file:", "data:image/png"))] == []

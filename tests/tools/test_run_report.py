"""One page for a run: whole without any other file, and with nothing of a stranger's running."""

import csv
import json
import shutil

import pytest
from helpers.coco_trees import NETWORK
from helpers.report_pages import EVIL, read, report_of
from helpers.small_runs import SMALL

from tools import run_report


def test_a_run_without_a_report_says_how_to_make_one(write_page, run_folder):
    code, out, err = write_page(run_folder)
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


def test_a_report_is_shown_whole(write_page, run_folder, tmp_path):
    report_of(run_folder, ["cat", "dog", "кошка"], tmp_path)
    assert write_page(run_folder)[0] == 0
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
    assert write_page(run_folder)[0] == 0
    assert "кошка" not in read(run_folder / "report.html").text


def test_a_thousand_classes(write_page, run_folder, tmp_path):
    names = [f"n{i:08d}" for i in range(1000)]
    report_of(run_folder, names, tmp_path, images=3000)
    assert write_page(run_folder)[0] == 0
    page = read(run_folder / "report.html")
    assert "All 1,000 classes" in page.text
    assert (run_folder / "report.html").stat().st_size < 3_000_000


def test_one_epoch_and_no_checkpoint(write_page, run_folder):
    for path in run_folder.glob("*.pth"):
        path.unlink()
    lines = (run_folder / "metrics.csv").read_text().splitlines()
    (run_folder / "metrics.csv").write_text("\n".join(lines[:2]) + "\n")
    code, out, _ = write_page(run_folder)
    assert code == 0
    assert "holds no checkpoint" in out[0]
    page = read(run_folder / "report.html")
    assert "no kernels to show" in page.text
    assert "1 of 2" in page.text


def test_eca_s_kernels_are_those_of_the_checkpoint(call, tree, tmp_path, figures, write_page):
    flags = (*SMALL[2:], "-a", "eca_mobilenetv2", "--epochs", 1, "--output", "run", tree)
    assert call(*flags)[0] == 0
    figures.clear()
    assert write_page(tmp_path / "run")[0] == 0
    lines = [line for axis in figures[0].axes for line in axis.lines if len(line.get_xdata()) == 3]
    saved = run_report.read_checkpoint(tmp_path / "run")[0]["state_dict"]
    kernels = [t.flatten().tolist() for t in saved.values() if t.ndim == 3]
    drawn = [line.get_ydata().tolist() for line in lines]
    assert kernels
    assert all(kernel in drawn for kernel in kernels if len(kernel) == 3)
    assert "Channel weights need images" in read(tmp_path / "run" / "report.html").text


def test_a_detector_s_run(write_page, detect, shapes, tmp_path):
    flags = ("--batch-size", 4, "--lr-steps", 1, "--warmup-steps", 2, "--optimizer", "sgd")
    detect(*NETWORK, *flags, "--epochs", 1, "--seed", 1, "--output", "run", shapes)
    code, _, err = write_page("run")
    assert (code, err) == (0, [])
    page = read(tmp_path / "run" / "report.html")
    assert page.titles == ["Curves", "Classes", "Network", "Settings", "Versions"]
    saved = run_report.read_checkpoint(tmp_path / "run")[0]
    summary = saved["progress"]["best"]["summaries"]["bbox"]
    for name, value in summary["per_class"].items():
        assert f"{name} {100 * value:.1f}" in page.text or value < 0
    assert "Box AP" in page.text
    assert "--report" not in page.text


def test_a_browser_shows_it_without_a_fault(write_page, run_folder, tmp_path):
    """No request, no message of the browser's, and nothing wider than a phone."""
    browsers = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser")
    report_of(run_folder, [EVIL, "a" * 300, "b c " * 90, "猫"], tmp_path)
    assert write_page(run_folder)[0] == 0
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

"""Pages of what no run of ours would write: strangers' names, numbers, files and values."""

import json
import shutil

import pytest
from helpers.report_pages import EVIL, Page, read, report_of

from utils.inspection.html_page import MARK
from utils.inspection.svg_curves import Line, chart


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


def test_damaged_checkpoints_leave_a_note(write_page, run_folder):
    for path in run_folder.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    code, out, _ = write_page(run_folder)
    assert code == 0
    assert "only damaged checkpoints" in out[0]
    assert read(run_folder / "report.html").pictures == []


def test_a_foreign_file_stays(write_page, run_folder, tmp_path):
    target = run_folder / "report.html"
    target.write_text("mine")
    code, out, err = write_page(run_folder)
    assert (code, out) == (2, [])
    assert "stays as it is" in err[0]
    assert target.read_text() == "mine"
    assert write_page(run_folder, "--output", tmp_path / "page.html")[0] == 0
    before = (tmp_path / "page.html").read_text()
    assert MARK in before
    assert write_page(run_folder, "--output", tmp_path / "page.html")[0] == 0  # its own is replaced
    target.unlink()
    target.symlink_to(tmp_path / "page.html")
    code, _, err = write_page(run_folder)
    assert code == 2
    assert "no plain file" in err[0]


@pytest.mark.parametrize(
    ("argument", "words"), [("nothing", "give folders of runs"), (".", "metrics.csv")]
)
def test_what_is_no_run_is_refused_in_one_line(write_page, argument, words):
    code, _, err = write_page(argument)
    assert code == 2
    assert len(err) == 1
    assert words in err[0]


@pytest.mark.parametrize("epoch", ["inf", "1e300", "nan", "-5"])
def test_numbers_of_strangers_that_cannot_be_are_refused(write_page, run_folder, epoch):
    head, first, *_ = (run_folder / "metrics.csv").read_text().splitlines()
    rows = [head, first, ",".join([epoch, *first.split(",")[1:]])]
    (run_folder / "metrics.csv").write_text("\n".join(rows))
    code, _, err = write_page(run_folder)
    assert code == 2
    assert "not what a run writes" in err[0]


def test_what_main_does_not_write_is_refused(write_page, run_folder, tmp_path):
    folder = report_of(run_folder, ["a", "b"], tmp_path)
    (folder / "confusion.png").write_bytes(b"<svg onload=alert(1)>")
    assert write_page(run_folder)[0] == 0
    assert "cannot be read as a PNG" in read(run_folder / "report.html").text
    secret = tmp_path / "secret.csv"
    secret.write_text("path\nsecret\n")
    (folder / "worst_images.csv").unlink()
    (folder / "worst_images.csv").symlink_to(secret)
    code, _, err = write_page(run_folder)
    assert code == 2
    assert len(err) == 1
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "report.json").write_text("[]")
    code, _, err = write_page(run_folder)
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

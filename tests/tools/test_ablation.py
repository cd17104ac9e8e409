"""python -m tools.ablation: the arithmetic of its table, and a small one from end to end."""

import csv
import math
import subprocess
import sys

import pytest
from helpers.trees import ROOT
from PIL import Image

from tools import ablation
from tools.ablation import run_all
from utils.study import ablation_results
from utils.study.ablation_results import Result, gain, rows
from utils.system.errors import UserError


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.ablation", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
    )


def test_gains_are_paired_by_seed():
    plain = Result("none", (90.0, 92.0, 97.0), 1000)
    better = Result("SE", (91.0, 93.0, 98.1), 1200)  # by 1 each time, whatever the seed does
    assert gain(better, plain) == pytest.approx((3.1 / 3, 0.1 / 3))
    same = Result("ECA-NS k=3", (91.0, 93.0, 98.0), 1100)  # no spread to judge by
    mixed = Result("ECA k=3", (91.0, 91.0, 98.5), 1003)  # +1, -1, +1.5
    mean, error = gain(mixed, plain)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt((0.5**2 + 1.5**2 + 1.0**2) / 2 / 3))
    table = rows([plain, better, mixed, same])
    assert table[1] == ["none", "1,000", "93.00", "3.61", "-", "-", "3"]
    assert table[2][4:6] == ["+1.03*", "0.03"]
    assert table[3][4:6] == ["+0.50", "0.76"]  # within the noise: no star
    assert table[4][4:6] == ["+1.00", "-"]


def test_a_star_takes_more_with_few_seeds():
    """Gains of 3.5 standard errors: with 3 seeds chance alone gives such in 7 of 100 cases."""
    for seeds, star in ((2, ""), (3, ""), (4, "*"), (40, "*")):
        spread = [(-1) ** i * (i < seeds - seeds % 2) for i in range(seeds)]
        error = gain(Result("", tuple(spread), 1), Result("", (0,) * seeds, 1))[1]
        better = Result("SE", tuple(90 + x + 3.5 * error for x in spread), 1)
        (cell,) = [row[4] for row in rows([Result("none", (90.0,) * seeds, 1), better])[2:]]
        assert cell == f"{3.5 * error:+.2f}{star}"


def test_one_seed_has_no_spread():
    table = rows([Result("none", (90.0,), 10), Result("SE", (95.0,), 12)])
    assert table[1][3] == "-"
    assert table[2][3:6] == ["-", "+5.00", "-"]


def test_the_picture_holds_every_run_and_the_sweep(figures):
    results = [
        Result("none", (90.0, 92.0), 1),
        Result("SE", (94.0, 95.0), 1),
        Result("ECA k=3", (93.0, 96.0), 1),
        Result("ECA k=9", (97.0, 98.0), 1),
    ]
    ablation_results.draw(results, "t")
    left, right = figures[0].axes
    assert [text.get_text() for text in left.get_yticklabels()] == [r.name for r in results]
    each, means = left.lines[::4], left.lines[1::4]  # two lines are the caps of a bar
    for i, r in enumerate(results):
        assert each[i].get_xydata().tolist() == [[top1, i] for top1 in r.top1]
        assert means[i].get_xydata().tolist() == [[r.mean, i]]
        (bar,) = left.collections[i].get_segments()
        assert bar[:, 0].tolist() == pytest.approx([r.mean - r.std, r.mean + r.std])
    (sweep,) = [
        line
        for line in right.lines
        if line.get_linestyle() == "-" and len(line.get_xdata()) == 2 and line.get_xdata()[0] == 3
    ]
    assert sweep.get_xydata().tolist() == [[3, 94.5], [9, 97.5]]
    levels = {line.get_label(): line.get_ydata()[0] for line in right.lines}
    assert (levels["no attention"], levels["SE"]) == (91.0, 94.5)


def test_the_variants_are_the_papers():
    command = ablation.command_of(
        ablation.VARIANTS["ECA-NS k=3"], "DATA", "resnet50", 2, ROOT / "x", ["--amp", "bf16"]
    )
    assert command[2:8] == ["DATA", "-a", "eca_resnet50", "--attention", "eca_ns", "--ksize"]
    assert command[-2:] == ["--amp", "bf16"]
    assert ablation.VARIANTS["ECA k=9"].flags == ("--ksize", "9999")


def test_a_failed_run_ends_the_rest_with_its_last_line(tmp_path):
    say = "import sys; print('first'); sys.exit('error: no such data')"
    commands = {
        tmp_path / "bad": [sys.executable, "-c", say],
        tmp_path / "long": [sys.executable, "-c", "import time; time.sleep(600)"],
    }
    with pytest.raises(UserError, match=r"bad failed \(.*bad.log\): error: no such data"):
        run_all(commands, jobs=2, environment={})


def test_from_end_to_end_and_again(tree, tmp_path):
    small = ("--", "--img-size", 32, "-b", 8, "--lr", 0.01, "-j", 0)
    given = (tree, "--output", tmp_path / "out", "--jobs", 2)
    variants = ("--variants", "none", "SE-Var1", "ECA-NS k=3", "ECA adaptive")
    done = call(*given, *variants, "--seeds", 1, *small, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "ablation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["attention"] for row in table] == list(variants[1:])
    counts = [int(row["parameters"]) for row in table]
    for row in table:
        run = tmp_path / "out" / f"{row['attention'].replace(' ', '_')}_seed{row['seed']}"
        with open(run / "metrics.csv", newline="") as file:
            best = max(float(epoch["val_top1"]) for epoch in csv.DictReader(file))
        assert float(row["top1"]) == pytest.approx(best, abs=1e-4)
    assert counts[1] == counts[0]
    assert counts[2] - counts[0] == 2 * 3 * (64 + 128 + 256 + 512)
    assert counts[3] - counts[0] == 2 * (3 + 5 + 5 + 5)
    Image.open(tmp_path / "out" / "ablation.png").verify()
    assert f"written to {tmp_path}/out" in done.stdout
    assert "top-1: of each run's best epoch, chosen on the same validation images" in done.stdout

    # Given again, what is done is not done again.
    weights = tmp_path / "out" / "none_seed0" / "best.pth"
    before = weights.stat().st_mtime_ns
    done = call(*given, "--variants", "none", "--seeds", 1, *small, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert weights.stat().st_mtime_ns == before


def test_bad_input():
    done = call("x", "--variants", "ECA k=4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no variant 'ECA k=4'; did you mean ECA k=")

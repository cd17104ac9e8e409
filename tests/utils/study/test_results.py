"""Rates chosen on validation images alone; tables and pictures that say what the figures say."""

import csv
import io

import pytest
from helpers.study_plans import result, small_plan

from utils.study import pictures, results, tables


@pytest.fixture
def plan(tmp_path):
    return small_plan(tmp_path)


@pytest.fixture
def runs():
    """SE is 2 points above none whatever the seed, ECA as often below as above."""
    chosen = [
        result("none", 0.01, 7, 50.0, None),
        result("none", 0.05, 7, 60.0, None),
        result("SE", 0.01, 7, 70.0, None),
        result("SE", 0.05, 7, 70.0, None),
        result("ECA k=3", 0.01, 7, 65.0, None),
        result("ECA k=3", 0.05, 7, 64.0, None),
    ]
    plain, eca = (80.0, 82.0, 84.0), (81.0, 81.0, 84.5)
    judged = [result("none", 0.05, s, 99.0, t) for s, t in enumerate(plain)]
    judged += [result("SE", 0.01, s, 1.0, t + 2 + 0.1 * s) for s, t in enumerate(plain)]
    judged += [result("ECA k=3", 0.01, s, 1.0, t) for s, t in enumerate(eca)]
    return [*chosen, *judged]


def test_validation_chooses_the_rate(plan, runs):
    rates = results.choose_rates(plan, runs)
    assert {variant: rate for (_, variant), rate in rates.items()} == {
        "none": 0.05,
        "SE": 0.01,  # the lower of equal ones
        "ECA k=3": 0.01,
    }
    rows = tables.choice_rows(plan, runs, rates)
    assert [row[4] for row in rows[1:]] == ["", "yes", "yes", "", "yes", ""]


def test_the_comparisons_and_their_words(plan, runs):
    found = results.compare_all(plan, runs)
    assert [(c.variant, c.against) for c in found] == plan.pairs
    assert found[0].difference.mean == pytest.approx(2.1)
    assert found[1].difference.mean == pytest.approx((1 - 1 + 0.5) / 3)
    assert found[0].p == pytest.approx(3 * found[0].difference.p)
    rows = tables.comparison_rows(plan, found)
    assert [row[-1] for row in rows[1:]] == ["higher", "no difference shown", rows[3][-1]]
    assert rows[1][3] == "+2.10"


def test_one_seed_says_nothing(tmp_path, runs):
    plan = small_plan(tmp_path, seeds=[0])
    runs = [run for run in runs if run.seed in (0, 7)]
    rows = tables.comparison_rows(plan, results.compare_all(plan, runs))
    assert {tuple(row[4:]) for row in rows[1:]} == {("-", "-", "one seed says nothing")}


def test_the_csv_has_every_run_and_no_formula(runs):
    rows = list(csv.DictReader(io.StringIO(results.runs_csv(runs).decode())))
    assert [row["name"] for row in rows] == [run.name for run in runs]
    assert rows[0]["test_top1"] == ""
    assert float(rows[-1]["test_top1"]) == 84.5
    assert {row["command"] for row in rows} == {"'=main.py"}


def test_the_report_tells_what_is_corrected(plan, runs):
    rates = results.choose_rates(plan, runs)
    text = tables.report(plan, runs, rates, results.compare_all(plan, runs))
    assert text.startswith("Does it work?\nDATA, 9 training images, 15 test images, plan ")
    assert "corrected for all 3 rows (Holm)" in text


def test_the_pictures_show_every_run_and_interval(plan, runs, figures):
    found = results.compare_all(plan, runs)
    pictures.draw_accuracy(plan, runs, found)
    left, right = figures[0].axes
    dots = [line.get_xdata().tolist() for line in left.lines if line.get_marker() == "o"]
    assert dots == [[80.0, 82.0, 84.0], pytest.approx([82.0, 84.1, 86.2]), [81.0, 81.0, 84.5]]
    ends = [bars.get_segments()[0][:, 0].tolist() for bars in right.collections]
    wanted = [[c.difference.low, c.difference.high] for c in found[:2]]
    assert ends == [pytest.approx(pair) for pair in wanted]

    pictures.draw_costs(plan, runs)
    first = figures[1].axes[0]
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in first.lines}
    assert points["none"] == [0, 82]
    assert points["SE"] == pytest.approx([100 * (2.2 / 2.4 - 1), 84.1])

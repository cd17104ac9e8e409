"""A study's plan, its statistics against scipy's, its tables and pictures."""

import csv
import hashlib
import io
import math

import numpy as np
import pytest
import torch
from helpers.study_plans import result, small_plan, write_plan
from helpers.trees import ROOT

import models
from utils.inspection import study
from utils.inspection.study import VARIANTS, arch_and_flags, compare, holm, read_plan, write_parts
from utils.system.errors import UserError


def test_a_plan_and_its_comparisons(tmp_path):
    plan = small_plan(tmp_path)
    assert plan.networks["mobilenetv2"].rates == (0.05, 0.01)
    assert plan.pairs == [("SE", "none"), ("ECA k=3", "none"), ("ECA k=3", "SE")]
    data = (tmp_path / "plan.json").read_bytes()
    assert plan.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level": ...}, "missing required field `level`"),
        ({"epochs": 3}, "unknown field `epochs`"),
        ({"level": 1.0}, r"`float` < 1.0 - at `\$.level`"),
        ({"variants": ["none", "ECA k=4"]}, "no variant 'ECA k=4'; did you mean ECA k="),
        ({"variants": ["SE", "none"], "also_compare": []}, "variants begin with 'none'"),
        ({"variants": ["none"], "also_compare": []}, r"length >= 2 - at `\$.variants`"),
        ({"also_compare": [["ECA adaptive", "none"]]}, "pairs of the plan's variants"),
        ({"seeds": [1, 1]}, "each once"),
        ({"networks": {"eca_resnet18": {"rates": [0.1], "flags": []}}}, "give a plain one"),
        ({"networks": {"resnet18": {"rates": [0.1, 0.1], "flags": []}}}, "give each once"),
        ({"variants": ["none", "CBAM", "timm:cbam"], "also_compare": []}, "CBAM and timm:cbam are"),
        ({"variants": ["none", "timm:no"], "also_compare": []}, "attention timm:no cannot be"),
        ({"networks": {"timm:resnet_18": {"rates": [0.1], "flags": []}}}, "timm has no classifier"),
        (
            {
                "networks": {"timm:resnet18": {"rates": [0.1], "flags": []}},
                "variants": ["none", "ECA published"],
                "also_compare": [],
            },
            "network timm:resnet18: ECA published is for our networks",
        ),
    ],
)
def test_what_is_no_plan(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        read_plan(write_plan(tmp_path / "plan.json", **changes))


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: .*truncated"):
        read_plan(tmp_path / "bad.json")


def test_the_plans_of_the_repository_are_plans():
    files = sorted((ROOT / "tools" / "study_plans").glob("*.json"))
    assert {file.stem for file in files} >= {"smoke", "fashion"}
    for file in files:
        read_plan(file)


@pytest.mark.parametrize("network", ["resnet18", "mobilenetv2"])
def test_every_variant_is_a_network_of_its_own(network):
    pytest.importorskip("timm")
    found = []
    for variant in VARIANTS:
        arch, flags = arch_and_flags(network, variant)
        words = [word for word in flags if word != "--identity-start"]
        given = {k.strip("-"): v for k, v in zip(words[::2], words[1::2], strict=True)}
        with torch.device("meta"):
            built = models.create_model(arch, num_classes=2, **given)
        found.append((built.attention, built.ksize, len(flags) - len(words)))
    by_name = dict(zip(VARIANTS, found, strict=True))
    kinds = ["none", "se", "se_var1", "se_var2", "se_var3", "eca_ns", *["eca"] * 8]
    kinds += ["timm:cbam", "timm:gc", "timm:coord", "timm:ela"]
    assert [attention for attention, *_ in found] == kinds
    assert set(by_name["ECA-NS k=3"][1]) == set(by_name["ECA k=3"][1]) == {3}
    assert set(by_name["ECA k=9"][1]) == {9}
    assert len(set(found)) == len(VARIANTS)


@pytest.mark.parametrize(
    ("variant", "attention", "sizes"),
    [
        ("none", "none", None),
        ("SE", "se", None),
        ("SE-Var2", "se_var2", None),
        ("ECA-NS k=3", "eca_ns", {3}),
        ("ECA k=5", "eca", {5}),
        ("ECA adaptive", "eca", {3, 5}),
        ("timm:gc", "timm:gc", None),
    ],
)
def test_a_librarys_network_has_the_same_variants(tmp_path, variant, attention, sizes):
    pytest.importorskip("timm")
    arch, flags = arch_and_flags("timm:test_resnet", variant)
    given = {k.strip("-"): v for k, v in zip(flags[::2], flags[1::2], strict=True)}
    built = models.create_model(arch, num_classes=2, **given)
    assert (built.attention, built.ksize and set(built.ksize)) == (attention, sizes)


@pytest.mark.parametrize("pairs", [2, 3, 5, 10])
def test_as_scipys_paired_test(pairs):
    chance = np.random.default_rng(pairs)
    ours, theirs = chance.normal(90.5, 1, pairs), chance.normal(90, 1, pairs)
    stats = pytest.importorskip("scipy.stats")
    difference, expected = compare(ours, theirs, 0.9), stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.9)
    assert difference.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert difference.p == pytest.approx(expected.pvalue)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_seeds_that_all_differ_by_the_same_and_single_ones():
    for theirs in ([0.5, 1.5], [0.9, 1.9]):  # 0.1 of both, but for rounding
        found = compare([1.0, 2.0], theirs)
        assert found.mean == pytest.approx(1.0 - theirs[0])
        assert all(map(math.isnan, (found.low, found.high, found.p)))
    assert compare([1.0, 2.0], [1.0, 2.0]).p == 1
    alone = compare([2.0], [1.5])
    assert alone.mean == 0.5
    assert all(map(math.isnan, (alone.low, alone.high, alone.p)))
    with pytest.raises(ValueError, match="zip"):
        compare([1.0], [1.0, 2.0])


def test_holm():
    # Smallest times 4, next times 3 and no smaller than the one before, and so on, at most 1.
    assert holm([0.02, 0.01, 0.03, 0.6]) == pytest.approx([0.06, 0.04, 0.06, 0.6])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([0.01, math.nan])
    assert corrected[0] == 0.02
    assert math.isnan(corrected[1])


def contents(folder) -> dict[str, set[bytes]]:
    return {c.name: {file.read_bytes() for file in c.iterdir()} for c in sorted(folder.iterdir())}


def test_the_parts_have_no_image_in_common(tree, tmp_path):
    write_parts(tree, tmp_path / "a", 3, 2, seed=0)
    train, val = (contents(tmp_path / "a" / part) for part in ("train", "val"))
    whole = contents(tree / "train")
    for name in whole:
        assert (len(train[name]), len(val[name])) == (3, 2)
        assert not train[name] & val[name]
        assert train[name] | val[name] <= whole[name]
    # All that are left, and the same validation images; another seed draws others.
    write_parts(tree, tmp_path / "b", None, 2, seed=0)
    assert contents(tmp_path / "b" / "val") == val
    assert {n: len(v) for n, v in contents(tmp_path / "b" / "train").items()} == dict.fromkeys(
        whole, 6
    )
    write_parts(tree, tmp_path / "c", 3, 2, seed=1)
    assert contents(tmp_path / "c" / "val") != val


def test_too_few_images(tree, tmp_path):
    with pytest.raises(UserError, match="class a has 8 images, and the plan takes 9"):
        write_parts(tree, tmp_path / "a", 6, 3, seed=0)


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
    tested = [result("none", 0.05, s, 99.0, t) for s, t in enumerate(plain)]
    tested += [result("SE", 0.01, s, 1.0, t + 2 + 0.1 * s) for s, t in enumerate(plain)]
    tested += [result("ECA k=3", 0.01, s, 1.0, t) for s, t in enumerate(eca)]
    return [*chosen, *tested]


def test_validation_chooses_the_rate(plan, runs):
    rates = study.choose_rates(plan, runs)
    assert {variant: rate for (_, variant), rate in rates.items()} == {
        "none": 0.05,
        "SE": 0.01,  # the lower of equal ones
        "ECA k=3": 0.01,
    }
    rows = study.choice_rows(plan, runs, rates)
    assert [row[4] for row in rows[1:]] == ["", "yes", "yes", "", "yes", ""]


def test_the_comparisons_and_their_words(plan, runs):
    found = study.compare_all(plan, runs)
    assert [(c.variant, c.against) for c in found] == plan.pairs
    assert found[0].difference.mean == pytest.approx(2.1)
    assert found[1].difference.mean == pytest.approx((1 - 1 + 0.5) / 3)
    assert found[0].p == pytest.approx(3 * found[0].difference.p)
    rows = study.comparison_rows(plan, found)
    assert [row[-1] for row in rows[1:]] == ["higher", "no difference shown", rows[3][-1]]
    assert rows[1][3] == "+2.10"


def test_one_seed_says_nothing(tmp_path, runs):
    plan = small_plan(tmp_path, seeds=[0])
    runs = [run for run in runs if run.seed in (0, 7)]
    rows = study.comparison_rows(plan, study.compare_all(plan, runs))
    assert {tuple(row[4:]) for row in rows[1:]} == {("-", "-", "one seed says nothing")}


def test_the_csv_has_every_run_and_no_formula(runs):
    rows = list(csv.DictReader(io.StringIO(study.runs_csv(runs).decode())))
    assert [row["name"] for row in rows] == [run.name for run in runs]
    assert rows[0]["test_top1"] == ""
    assert float(rows[-1]["test_top1"]) == 84.5
    assert {row["command"] for row in rows} == {"'=main.py"}


def test_the_report_tells_what_is_corrected(plan, runs):
    rates = study.choose_rates(plan, runs)
    text = study.report(plan, runs, rates, study.compare_all(plan, runs))
    assert text.startswith("Does it work?\nDATA, 9 training images, 15 test images, plan ")
    assert "corrected for all 3 rows (Holm)" in text


def test_the_pictures_show_every_run_and_interval(plan, runs, figures):
    found = study.compare_all(plan, runs)
    study.draw_accuracy(plan, runs, found)
    left, right = figures[0].axes
    dots = [line.get_xdata().tolist() for line in left.lines if line.get_marker() == "o"]
    assert dots == [[80.0, 82.0, 84.0], pytest.approx([82.0, 84.1, 86.2]), [81.0, 81.0, 84.5]]
    ends = [bars.get_segments()[0][:, 0].tolist() for bars in right.collections]
    wanted = [[c.difference.low, c.difference.high] for c in found[:2]]
    assert ends == [pytest.approx(pair) for pair in wanted]

    study.draw_costs(plan, runs)
    first = figures[1].axes[0]
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in first.lines}
    assert points["none"] == [0, 82]
    assert points["SE"] == pytest.approx([100 * (2.2 / 2.4 - 1), 84.1])

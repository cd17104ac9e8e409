"""Paired differences against scipy's paired t-test, and Holm's correction by hand."""

import math

import numpy as np
import pytest

from utils.study.comparison import compare, holm

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("pairs", [2, 3, 5, 10])
def test_as_scipys_paired_test(pairs):
    chance = np.random.default_rng(pairs)
    ours, theirs = chance.normal(90.5, 1, pairs), chance.normal(90, 1, pairs)
    found, wanted = compare(ours, theirs, 0.9), stats.ttest_rel(ours, theirs)
    interval = wanted.confidence_interval(0.9)
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


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

"""Computes paired differences between two kinds of network, and corrects for their number."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from utils.study.student_t import quantile, two_sided_p


@dataclass(frozen=True)
class Difference:
    """Holds the mean of the differences of paired runs.

    Args:
        mean: in the runs' own unit.
        low, high: the confidence interval of this one comparison, by Student's t; nan for a single
            pair.
        p: the probability of such a mean or a larger one, of either sign, where there is no
            difference; nan for a single pair.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def compare(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Difference:
    """Compares runs in pairs: the same seed gives both the same images in the same order.

    Args:
        ours, theirs: one figure a seed, in the same order of seeds.
        level: of the interval.

    Raises:
        ValueError: the lengths differ, or there are no runs.
    """
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, freedom = statistics.fmean(each), len(each) - 1
    if not freedom:
        return Difference(mean, math.nan, math.nan, math.nan, 1)
    error = statistics.stdev(each) / math.sqrt(len(each))
    reach = quantile(level, freedom) * error
    if not error:  # every pair differs by the same
        return Difference(mean, mean, mean, float(mean == 0), len(each))
    p = two_sided_p(mean / error, freedom)
    return Difference(mean, mean - reach, mean + reach, p, len(each))


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number, in the order given (Holm, 1979).

    A corrected value below 0.05 keeps the chance of even one false finding among all of them below
    5 %. Values that are nan stay nan and still count as comparisons.
    """
    count, reached = len(values), 0.0
    corrected = [math.nan] * count
    known = [i for i in range(count) if not math.isnan(values[i])]
    for rank, i in enumerate(sorted(known, key=lambda i: values[i])):
        reached = max(reached, min(1.0, (count - rank) * values[i]))
        corrected[i] = reached
    return corrected

"""Computes paired differences between two kinds of network, and corrects for their number."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from utils.study.student_t import quantile, two_sided_p

ALIKE = 1e-9  # differences that are closer are the same, rounded otherwise


@dataclass(frozen=True)
class Difference:
    """Holds the mean of the differences of paired runs.

    Args:
        mean: in the runs' own unit.
        low, high: the confidence interval of this one comparison, by Student's t; nan where the
            pairs have no spread, see `standard_error`.
        p: the probability of such a mean or a larger one, of either sign, where there is no
            difference; nan as the interval, but 1 where all pairs are equal.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def standard_error(each: Sequence[float]) -> float:
    """Returns the standard error of the mean of paired differences; nan where they have no spread.

    That is a single pair, or pairs that all differ by the same. Accuracy counts whole images, so
    two or three seeds may do so by chance: it is no sign that another seed would, too.
    """
    if len(each) < 2 or max(each) - min(each) <= ALIKE:
        return math.nan
    return statistics.stdev(each) / math.sqrt(len(each))


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
    error = standard_error(each)
    if math.isnan(error):
        p = 1.0 if freedom and abs(mean) <= ALIKE else math.nan
        return Difference(mean, math.nan, math.nan, p, len(each))
    reach = quantile(level, freedom) * error
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

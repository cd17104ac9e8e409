"""Computes Student's t distribution, exactly for whole degrees of freedom.

The sums are 26.7.3 and 26.7.4 of Abramowitz and Stegun, Handbook of Mathematical Functions.
"""

import math


def within(t: float, freedom: int) -> float:
    """Returns the probability that |T| is at most t.

    Args:
        t: 0 or more.
        freedom: degrees of freedom, 1 or more.
    """
    if math.isinf(t):
        return 1.0
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def two_sided_p(t: float, freedom: int) -> float:
    """Returns the probability of a |T| as large as |t| or larger."""
    return max(0.0, 1.0 - within(abs(t), freedom))


def quantile(level: float, freedom: int) -> float:
    """Returns t with the probability `level` between -t and t, as of a confidence interval.

    Args:
        level: in (0, 1), such as 0.95.
    """
    low, high = 0.0, 1.0
    while within(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if within(middle, freedom) < level else (low, middle)
    return high

"""Student's t: against scipy's, over the whole range that a study meets."""

import pytest

from utils.study.student_t import quantile, two_sided_p, within

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 58, 101])
def test_as_scipy(freedom):
    for t in (0.0, 1e-4, 0.3, 1.0, 2.776, 12.7, 300.0):
        tail = 2 * stats.t.sf(t, freedom)
        assert within(t, freedom) == pytest.approx(1 - tail, abs=1e-13)
        assert two_sided_p(-t, freedom) == pytest.approx(tail, abs=1e-13)
    for level in (0.5, 0.9, 0.95, 0.99, 0.999):
        wanted = stats.t.ppf(0.5 + level / 2, freedom)
        assert quantile(level, freedom) == pytest.approx(wanted, rel=1e-10)


def test_without_bound():
    assert within(float("inf"), 3) == 1
    assert two_sided_p(float("-inf"), 3) == 0

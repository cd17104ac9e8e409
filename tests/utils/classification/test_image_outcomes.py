"""Outcomes image by image: the same sums as without them, and the same idea of what is right."""

import numpy as np
import pytest
import torch

from utils.classification.image_outcomes import NONE, OutcomeMeter
from utils.classification.metrics import ClassificationMeter, cross_entropy

CPU = torch.device("cpu")


def fed(meter, batches):
    for logits, targets in batches:
        meter.update(cross_entropy(logits, targets), logits, targets)
    return meter


def chance_batches(classes: int, sizes=(5, 4, 1)):
    make = torch.Generator().manual_seed(classes)
    for size in sizes:
        logits = torch.randn(size, classes, generator=make).mul(3).round()  # with many ties
        yield logits, torch.randint(classes, (size,), generator=make)


@pytest.mark.parametrize("classes", [1, 2, 3, 20])
def test_sums_are_those_of_the_plain_meter_to_the_bit(classes):
    plain = fed(ClassificationMeter(CPU), chance_batches(classes))
    meter = fed(OutcomeMeter(CPU), chance_batches(classes))
    assert meter.total().tolist() == plain.total().tolist()
    found = meter.outcomes(range(10), 10)
    n = len(found)
    figures = meter.means(meter.total())
    assert 100 * int((found.found == found.true).sum()) / n == figures["top1"]
    assert 100 * int(found.in_top5.sum()) / n == figures["top5"]
    assert found.loss.mean() == pytest.approx(figures["loss"], rel=1e-6)
    assert found.outputs == classes


def test_probabilities_are_those_of_softmax_in_float64():
    batches = list(chance_batches(7))
    found = fed(OutcomeMeter(CPU), batches).outcomes(range(10), 10)
    rows, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for i, (logits, true) in enumerate(zip(rows, targets, strict=True)):
        shares = np.exp(logits.double().numpy())
        shares /= shares.sum()
        assert found.true[i] == true
        assert found.confidence[i] == pytest.approx(shares[found.found[i]], rel=1e-5)
        assert found.true_confidence[i] == pytest.approx(shares[true], rel=1e-5)
        assert found.loss[i] == pytest.approx(-np.log(shares[true]), rel=1e-5, abs=1e-6)


def test_outcomes_come_in_the_data_s_order():
    logits, targets = torch.eye(3)[[2, 0, 1]], torch.tensor([2, 0, 0])
    meter = fed(OutcomeMeter(CPU), [(logits, targets)])
    found = meter.outcomes([2, 0, 1], 3)
    assert found.true.tolist() == [0, 0, 2]
    assert found.found.tolist() == [0, 1, 2]


def test_an_image_that_is_judged_twice_or_never_is_noticed():
    batches = list(chance_batches(3))
    with pytest.raises(AssertionError):
        fed(OutcomeMeter(CPU), batches).outcomes([0, *range(9)], 10)
    with pytest.raises(AssertionError):
        fed(OutcomeMeter(CPU), batches).outcomes(range(10), 11)


def test_an_output_that_is_not_finite_finds_no_class():
    logits = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [1.0, 0.0]])
    found = fed(OutcomeMeter(CPU), [(logits, torch.tensor([0, 1, 0]))]).outcomes(range(3), 3)
    assert found.found.tolist() == [NONE, NONE, 0]
    assert found.in_top5.tolist() == [False, False, True]
    assert np.isnan(found.confidence).tolist() == [True, True, False]
    assert np.isnan(found.loss).tolist() == [True, True, False]

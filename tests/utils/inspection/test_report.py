"""Predictions of images, and figures by class, pair and confidence, against scikit-learn."""

import csv
import io
import math

import numpy as np
import pytest
import torch

from utils.inspection.report import (
    NONE,
    Calibration,
    ClassFigures,
    EvaluatedImages,
    Report,
    ReportMeter,
    class_pairs,
    confused,
    matrix,
)
from utils.training.classification import ClassificationMeter, cross_entropy

metrics = pytest.importorskip("sklearn.metrics")
CPU = torch.device("cpu")


def chance_images(n: int, classes: int, without: tuple[int, ...] = (), seed: int = 0):
    """By chance; classes in `without` are never predicted, one image in eight has no output."""
    chance = np.random.default_rng(seed)
    true = chance.integers(0, classes, n)
    predicted = np.where(chance.random(n) < 0.5, true, chance.integers(0, classes, n))
    predicted = np.where(np.isin(predicted, without), 0, predicted)
    predicted = np.where(np.arange(n) % 8 == 7, NONE, predicted)
    confidence = np.where(predicted == NONE, np.nan, chance.random(n))
    in_top5 = (predicted == true) | (chance.random(n) < 0.5)
    loss = np.where(predicted == NONE, np.nan, chance.random(n))
    return EvaluatedImages(true, predicted, in_top5, confidence, confidence / 2, loss, classes)


@pytest.mark.parametrize(
    ("n", "classes", "without"), [(9, 1, ()), (200, 3, (2,)), (300, 10, ()), (50, 1000, ())]
)
def test_figures_by_class_are_those_of_scikit_learn(n, classes, without):
    images = chance_images(n, classes, without)
    figures = ClassFigures.of(images, classes)
    labels = range(classes)
    expected = metrics.precision_recall_fscore_support(
        images.true, images.predicted, labels=labels, zero_division=np.nan
    )
    for ours, theirs in zip((figures.precision, figures.recall), expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_array_equal(figures.support, expected[3])
    there = figures.support + figures.predicted > 0
    zeros = metrics.precision_recall_fscore_support(
        images.true, images.predicted, labels=labels, zero_division=0
    )
    np.testing.assert_allclose(figures.f1[there], zeros[2][there], rtol=1e-12)
    assert np.isnan(figures.f1[~there]).all()
    assert all(math.isnan(figures.precision[i]) for i in without)
    with_images = np.flatnonzero(figures.support)
    means = metrics.precision_recall_fscore_support(
        images.true, images.predicted, labels=with_images, average="macro", zero_division=0
    )
    np.testing.assert_allclose(list(figures.means().values()), means[:3], rtol=1e-12)
    for i in with_images:
        chosen = images.true == i
        assert figures.top5[i] == pytest.approx(images.in_top5[chosen].sum() / chosen.sum())


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_pairs_are_scikit_learn_s_confusion_matrix(classes):
    images = chance_images(400, classes)
    pairs = class_pairs(images, classes)
    finite = images.predicted != NONE
    expected = metrics.confusion_matrix(
        images.true[finite], images.predicted[finite], labels=range(classes)
    )
    np.testing.assert_array_equal(matrix(pairs, classes), expected)
    true, predicted, numbers = confused(pairs).T
    assert (true != predicted).all()
    assert (np.diff(numbers) <= 0).all()
    assert numbers.sum() == expected.sum() - np.trace(expected)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_that_of_a_loop(bins):
    images = chance_images(500, 4)
    edges = [i / bins for i in range(bins + 1)]
    images.confidence[:3] = 0.0, 1.0, edges[bins // 2]  # on edges: the lower bin has them
    images.predicted[:3] = 0
    calibration = Calibration.of(images, bins)
    total = error = 0.0
    for i in range(bins):
        low = -1 if i == 0 else edges[i]
        chosen = [k for k, c in enumerate(images.confidence) if low < c <= edges[i + 1]]
        assert calibration.images[i] == len(chosen)
        if chosen:
            right = sum(images.true[k] == images.predicted[k] for k in chosen) / len(chosen)
            sure = math.fsum(images.confidence[k] for k in chosen) / len(chosen)
            assert calibration.accuracy[i] == pytest.approx(right, rel=1e-12)
            assert calibration.confidence[i] == pytest.approx(sure, rel=1e-12)
            error += len(chosen) * abs(right - sure)
            total += len(chosen)
    assert total == (images.predicted != NONE).sum()
    assert calibration.error == pytest.approx(error / total, rel=1e-12)


def test_without_a_finite_output_nothing_is_defined():
    nothing = np.full(2, np.nan)
    images = EvaluatedImages(
        np.array([0, 1]), np.array([NONE, NONE]), np.zeros(2, bool), nothing, nothing, nothing, 2
    )
    assert math.isnan(Calibration.of(images).error)
    assert ClassFigures.of(images, 2).means() == {"precision": 0, "recall": 0, "f1": 0}
    assert len(class_pairs(images, 2)) == 0


def test_the_worst_images_have_the_highest_loss_and_no_number_comes_first():
    loss = np.array([1.0, np.nan, 3.0, 3.0, 0.5])
    images = chance_images(5, 2)
    images = EvaluatedImages(**{**vars(images), "loss": loss})
    assert images.worst(4).tolist() == [1, 2, 3, 0]


def test_no_cell_begins_as_a_formula_does():
    names = ["=1+1", "+2", "-3", "@x", "plain, with a comma\nand a line"]
    files = Report(chance_images(200, 5), names, ["=cmd/1.png"] * 9).tables()
    assert len(files) == 5
    del files["calibration.csv"]  # numbers alone
    for file in files.values():
        rows = list(csv.reader(io.StringIO(file.decode())))
        assert len({len(row) for row in rows}) == 1
        cells = [cell for row in rows for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
        assert "'=1+1" in cells


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
    plain = fed(ClassificationMeter(CPU, 3), chance_batches(classes))
    meter = fed(ReportMeter(CPU, 3), chance_batches(classes))
    assert meter.sums.tolist() == plain.sums.tolist()
    images = meter.gathered(range(10), 10)
    n = len(images)
    figures = meter.means()
    assert 100 * int((images.predicted == images.true).sum()) / n == figures["top1"]
    assert 100 * int(images.in_top5.sum()) / n == figures["top5"]
    assert images.loss.mean() == pytest.approx(figures["loss"], rel=1e-6)
    assert images.outputs == classes


def test_probabilities_are_those_of_softmax_in_float64():
    batches = list(chance_batches(7))
    images = fed(ReportMeter(CPU, 3), batches).gathered(range(10), 10)
    rows, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for i, (logits, true) in enumerate(zip(rows, targets, strict=True)):
        shares = np.exp(logits.double().numpy())
        shares /= shares.sum()
        assert images.true[i] == true
        assert images.confidence[i] == pytest.approx(shares[images.predicted[i]], rel=1e-5)
        assert images.true_confidence[i] == pytest.approx(shares[true], rel=1e-5)
        assert images.loss[i] == pytest.approx(-np.log(shares[true]), rel=1e-5, abs=1e-6)


def test_predictions_come_in_the_data_s_order():
    logits, targets = torch.eye(3)[[2, 0, 1]], torch.tensor([2, 0, 0])
    meter = fed(ReportMeter(CPU, 3), [(logits, targets)])
    images = meter.gathered([2, 0, 1], 3)
    assert images.true.tolist() == [0, 0, 2]
    assert images.predicted.tolist() == [0, 1, 2]


def test_an_image_that_is_evaluated_twice_or_never_is_noticed():
    batches = list(chance_batches(3))
    with pytest.raises(AssertionError):
        fed(ReportMeter(CPU, 3), batches).gathered([0, *range(9)], 10)
    with pytest.raises(AssertionError):
        fed(ReportMeter(CPU, 3), batches).gathered(range(10), 11)


def test_an_output_that_is_not_finite_has_no_class():
    logits = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [1.0, 0.0]])
    images = fed(ReportMeter(CPU, 3), [(logits, torch.tensor([0, 1, 0]))]).gathered(range(3), 3)
    assert images.predicted.tolist() == [NONE, NONE, 0]
    assert images.in_top5.tolist() == [False, False, True]
    assert np.isnan(images.confidence).tolist() == [True, True, False]
    assert np.isnan(images.loss).tolist() == [True, True, False]

"""Counts and means against loops over samples."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy

from main import RECIPE
from utils.config.recipes import RECIPES
from utils.training.classification import (
    ClassificationMeter,
    Objective,
    RecallMeter,
    binary_cross_entropy,
    count_correct,
    cross_entropy,
)


def slow_correct(logits: torch.Tensor, targets: torch.Tensor, k: int) -> int:
    hits = 0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda c: -row[c])
        hits += target in ranked[:k]
    return hits


@pytest.mark.parametrize("classes", [1, 3, 5, 50])
def test_correct_counts(classes):
    torch.manual_seed(classes)
    logits = torch.randn(64, classes).t().contiguous().t()  # not contiguous
    targets = torch.randint(classes, (64,))
    found = count_correct(logits, targets, (1, 5)).tolist()
    assert found == [slow_correct(logits, targets, 1), slow_correct(logits, targets, 5)]


def test_meter_weighs_batches_by_their_size():
    torch.manual_seed(0)
    logits, targets = torch.randn(13, 7, dtype=torch.float64), torch.randint(7, (13,))
    meter = ClassificationMeter(torch.device("cpu"), 7)
    for part in (slice(0, 8), slice(8, 12), slice(12, 13)):
        loss = torch.nn.functional.cross_entropy(logits[part], targets[part])
        meter.update(loss, logits[part], targets[part])
    means = meter.means()
    assert means["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-12
    )
    assert means["top1"] == pytest.approx(100 * slow_correct(logits, targets, 1) / 13)
    assert means["top5"] == pytest.approx(100 * slow_correct(logits, targets, 5) / 13)


def test_an_empty_meter_has_no_figures():
    meter = ClassificationMeter(torch.device("cpu"), 7)
    assert all(math.isnan(v) for v in meter.means().values())


def test_cross_entropy_is_float32_for_half_logits():
    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert loss.dtype == torch.float32


def test_counts_are_exact_beyond_float32():
    meter = ClassificationMeter(torch.device("cpu"), 7)
    meter.sums[3] = 2**24
    meter.update(torch.tensor(1.0), torch.eye(1), torch.tensor([0]))
    assert meter.samples() == 2**24 + 1


def test_recall_is_scikit_learn_s_balanced_accuracy():
    """Over the classes that have images; a row that is no number is never right."""
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 6), torch.randint(5, (40,)) ** 2 % 5  # none of class 5
    logits[7] = math.nan
    meter = RecallMeter(torch.device("cpu"), 6)
    for part in (slice(0, 30), slice(30, 40)):
        meter.update(cross_entropy(logits[part], targets[part]), logits[part], targets[part])
    guesses = logits.argmax(1)
    guesses[7] = (targets[7] + 1) % 5
    recall = 100 * balanced_accuracy_score(targets, guesses)
    assert meter.means()["recall"] == pytest.approx(recall, rel=1e-12)
    assert meter.means()["top1"] != pytest.approx(recall, rel=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_ruined_row_leaves_the_others(bad):
    logits = torch.eye(3)
    logits[0, 1] = bad
    assert count_correct(logits, torch.arange(3), (1, 2)).tolist() == [2, 2]
    logits[:] = bad  # no figure of a ruined network is right
    assert count_correct(logits, torch.zeros(3, dtype=torch.long), (1, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_class_weights_are_factors_of_the_classes_terms(smoothing, mixed):
    """A loop in float64: mean over images of Σ_c -w_c y_c log p_c."""
    chance = np.random.default_rng(0)
    logits, weights = chance.normal(size=(6, 4)), np.array([0.5, 2.0, 1.0, 7.0])
    labels = np.array([0, 3, 1, 2, 3, 0])
    shares = np.eye(4)[labels]
    if mixed:
        shares = 0.7 * shares + 0.3 * np.roll(shares, 1, axis=0)
    total = 0.0
    for x, y in zip(logits, (1 - smoothing) * shares + smoothing / 4, strict=True):
        logs = x - np.log(np.exp(x).sum())
        for c in range(4):
            total -= weights[c] * y[c] * logs[c]
    targets = torch.tensor(shares if mixed else labels)
    if mixed:
        targets = targets.float()
    found = cross_entropy(torch.tensor(logits), targets, smoothing, torch.tensor(weights).float())
    assert found.item() == pytest.approx(total / 6, rel=1e-6)
    ones = cross_entropy(torch.tensor(logits), targets, smoothing, torch.ones(4))
    torch.testing.assert_close(ones, cross_entropy(torch.tensor(logits), targets, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_is_timm_s(smoothing, threshold, weighted):
    """Of labels, and of targets as timm's mixing smooths and mixes them."""
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(8, 5), torch.arange(8) % 5
    weights = torch.rand(5) + 0.5 if weighted else None
    reference = BinaryCrossEntropy(smoothing, threshold or None, weights)
    ours = partial(
        binary_cross_entropy,
        label_smoothing=smoothing,
        class_weights=weights,
        threshold=threshold,
    )
    torch.testing.assert_close(ours(logits, labels), reference(logits, labels))
    for share in (0.9, 0.7, 0.15):
        mixed = mixup_target(labels, 5, lam=share, smoothing=smoothing)
        hot = torch.nn.functional.one_hot(labels, 5).float()
        shares = share * hot + (1 - share) * hot.flip(0)
        torch.testing.assert_close(ours(logits, shares), reference(logits, mixed))
    half = ours(logits.bfloat16(), labels)
    assert half.dtype == torch.float32


def test_a_share_at_the_threshold_is_none():
    """As in timm: above it an image counts as of the class."""
    logits, shares = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.25, 0.26, 0.49]])
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor([[0.0, 1.0, 1.0]])
    )
    assert torch.equal(binary_cross_entropy(logits, shares, threshold=0.25), wanted)


def test_what_a1_s_smoothing_does():
    """It moves the threshold from 0.2 to 0.2 / 0.9, and so two shares of a mixed image apart."""
    a1 = RECIPE.override(**RECIPES["a1"])
    smoothed, plain = (
        Objective.of(recipe, 1000, None, torch.device("cpu")).loss
        for recipe in (a1, a1.override(label_smoothing=0.0))
    )
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 1000), torch.arange(4)
    hot = torch.nn.functional.one_hot(labels, 1000).float()
    assert torch.equal(smoothed(logits, labels), plain(logits, labels))
    for share in (0.01, 0.1, 0.19, 0.21, 0.22, 0.23, 0.3, 0.5):
        mixed = share * hot + (1 - share) * hot.roll(1, 0)
        equal = torch.equal(smoothed(logits, mixed), plain(logits, mixed))
        assert equal == (not 0.2 < share <= 0.2 / 0.9)
    without = binary_cross_entropy(logits, labels, 0.1)
    assert not torch.equal(without, smoothed(logits, labels))  # it works where nothing is cut

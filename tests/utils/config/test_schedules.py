"""The learning rate against the paper's two schedules and a cosine worked out by hand."""

import math

import pytest

from utils.config.classification import SCHEDULES, Recipe


def lr_at(step: int, steps_per_epoch: int, **values) -> float:
    recipe = Recipe(
        arch="x", batch_size=4, momentum=0.9, weight_decay=0, **{"schedule": "step", **values}
    )
    return recipe.lr_at(step, steps_per_epoch)


def test_step_divides_by_ten_every_thirty_epochs():
    rates = [lr_at(e * 5, 5, lr=0.1, epochs=100, schedule="step") for e in range(100)]
    assert rates[:30] == [0.1] * 30
    assert rates[30:60] == pytest.approx([0.01] * 30)
    assert rates[90:] == pytest.approx([1e-4] * 10)
    assert lr_at(149, 5, lr=0.1, epochs=100) == 0.1  # the last step of epoch 29


def test_exp_decays_every_epoch():
    rates = [
        lr_at(e * 3 + 2, 3, lr=0.045, epochs=400, schedule="exp", lr_decay=0.98)
        for e in (0, 1, 399)
    ]
    assert rates == pytest.approx([0.045, 0.045 * 0.98, 0.045 * 0.98**399])


def test_cosine_after_a_linear_warmup():
    rates = [lr_at(s, 10, lr=0.2, epochs=5, schedule="cosine", warmup_epochs=1) for s in range(50)]
    assert rates[:10] == pytest.approx([0.02 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(0.2)
    assert rates[30] == pytest.approx(0.1)  # half way
    assert rates[49] == pytest.approx(0.1 * (1 + math.cos(math.pi * 39 / 40)))
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_that_is_longer_than_planned_stays_at_zero():
    assert lr_at(99, 10, lr=0.2, epochs=5, schedule="cosine") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_to_the_peak_before_any_schedule(schedule):
    rates = [
        lr_at(s, 10, lr=0.1, epochs=9, schedule=schedule, warmup_epochs=2.5) for s in range(90)
    ]
    assert rates[:25] == pytest.approx([0.1 * (s + 1) / 25 for s in range(25)])
    assert max(rates) == pytest.approx(0.1)


def test_a_run_that_is_all_warm_up():
    for epochs, last in ((1, 0.1), (5, 0.02)):
        rate = lr_at(9, 10, lr=0.1, epochs=1, schedule="cosine", warmup_epochs=epochs)
        assert rate == pytest.approx(last)


def test_steps_of_a_recipe():
    rates = [
        lr_at(s, 10, lr=0.2, epochs=5, schedule="step", lr_step=2, lr_decay=0.5)
        for s in (0, 19, 20, 49)
    ]
    assert rates == [0.2, 0.2, 0.1, 0.05]

"""The paper's schedule for COCO, and recipes that survive a checkpoint."""

import json

import pytest

from utils.config.detection import DetectionRecipe


def test_the_papers_schedule():
    recipe = DetectionRecipe().resolved()
    assert recipe.lr == 0.01
    steps = 1000
    assert recipe.lr_at(0, steps) == pytest.approx(0.01 / 3)
    assert recipe.lr_at(250, steps) == pytest.approx(0.01 * 2 / 3)
    assert recipe.lr_at(500, steps) == 0.01
    assert recipe.lr_at(8 * steps - 1, steps) == 0.01
    assert recipe.lr_at(8 * steps, steps) == pytest.approx(0.001)
    assert recipe.lr_at(11 * steps, steps) == pytest.approx(0.0001)


def test_a_warm_up_reaches_over_a_decay():
    recipe = DetectionRecipe(lr=1.0, lr_steps=(1,), warmup_steps=20, warmup_factor=0.0)
    assert recipe.lr_at(5, 10) == pytest.approx(0.25)
    assert recipe.lr_at(10, 10) == pytest.approx(0.05)


def test_auto_scales_with_the_batch():
    assert DetectionRecipe(batch_size=16).resolved().lr == pytest.approx(0.02)
    assert DetectionRecipe(batch_size=16, lr=0.3).resolved().lr == 0.3


def test_recipes_survive_json():
    recipe = DetectionRecipe(lr_steps=(3, 5), settings={"mask_pool": 7}).resolved()
    again = DetectionRecipe.from_dict(json.loads(json.dumps(recipe.as_dict())) | {"later": 1})
    assert again == recipe
    assert recipe.override(epochs=None, lr=0.5) == DetectionRecipe.from_dict(
        recipe.as_dict() | {"lr": 0.5}
    )

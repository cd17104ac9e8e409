"""Every value of a named recipe does something: without it batches, steps or figures are others."""

import functools

import numpy as np
import pytest
import torch
from helpers.small_epochs import begin_state, train

import models
from main import RECIPE
from models.eca_resnet import BasicBlock, ResNet
from utils.config.classification import Recipe
from utils.config.recipes import RECIPES
from utils.data.image_folder import ImageFolder
from utils.data.loader import Batch
from utils.data.transforms import Preprocessing, train_transform
from utils.system.distributed import Context
from utils.training.classification import Objective, binary_cross_entropy
from utils.training.classification_data import TrainingData
from utils.training.optim import StepRule

CONTEXT = Context(torch.device("cpu"))
IMAGES = ImageFolder("x", ("a", "b"), np.array([b"x"] * 20_000), np.arange(20_000) % 2)
DATA = TrainingData(IMAGES, IMAGES, "")
PAPER = RECIPE.override(arch="eca_resnet18", epochs=90)
FIELDS = [(name, field) for name, values in RECIPES.items() for field in values]
# Thresholded targets are 0 and 1 again: docs/RECIPES.md says so of A1.
NO_EFFECT = {("a1", "label_smoothing")}


@functools.cache
def picture() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(256, (3, 120, 160), dtype=torch.uint8)


def aim_of(recipe: Recipe, outputs: int) -> Objective:
    return Objective.of(recipe, outputs, None, CONTEXT.device)


def what_a_run_sees(recipe: Recipe) -> list[torch.Tensor]:
    """The order of images, one of them as training and evaluation see it, and the first rates."""
    order = DATA.order(recipe, 1, CONTEXT)
    keys = [torch.tensor([index for _, index, *_ in next(iter(order))])]
    augment = train_transform(
        recipe.crop_size,
        recipe.min_scale,
        recipe.hflip,
        recipe.auto_augment,
        recipe.random_erasing,
    )
    image = picture()
    torch.manual_seed(6)
    images = [torch.as_tensor(augment(image)) for _ in range(4)]
    evaluated = Preprocessing(recipe.img_size, recipe.crop_pct)(image)
    rates = [recipe.lr_at(step, order.steps) for step in range(0, 90 * order.steps, 7)]
    return [*keys, *images, torch.as_tensor(evaluated), torch.tensor(rates)]


def what_three_steps_do(recipe: Recipe) -> list[torch.Tensor]:
    """The weights after them, and the logits in evaluation."""
    torch.manual_seed(0)
    network = ResNet(BasicBlock, (1, 1, 0, 0), ksize="3333", num_classes=5)
    network.layer3, network.layer4 = torch.nn.Identity(), torch.nn.Identity()
    network.fc = torch.nn.Linear(128, 5)
    models.set_drop_path(network, recipe.drop_path)
    state = begin_state(network, recipe)
    state.begin(5)
    torch.manual_seed(1)
    images = torch.randn(3, 4, 3, 16, 16)
    batches = [Batch(x, torch.randint(5, (4,)), ()) for x in images]
    train(
        network,
        batches,
        state=state,
        rule=StepRule.of(recipe, 2, 1, "off", CONTEXT),
        aim=aim_of(recipe, 5),
    )
    state.evaluated.eval()
    with torch.inference_mode():
        return [*(p.clone() for p in network.parameters()), state.evaluated(images[0])]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@functools.cache
def of_the_recipe(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    recipe = PAPER.override(**RECIPES[name])
    return what_a_run_sees(recipe), what_three_steps_do(recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_recipe_does_the_same(name):
    """What the next test finds to differ, differs by the recipe alone."""
    recipe = PAPER.override(**RECIPES[name])
    seen, done = of_the_recipe(name)
    assert same(seen, what_a_run_sees(recipe))
    assert same(done, what_three_steps_do(recipe))


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_each_value_of_a_recipe_has_an_effect(name, field):
    seen, done = of_the_recipe(name)
    without = PAPER.override(**{**RECIPES[name], field: getattr(PAPER, field)})
    if without == PAPER.override(**RECIPES[name]):
        return  # the recipe repeats what is usual
    alike = same(seen, what_a_run_sees(without)) and same(done, what_three_steps_do(without))
    assert alike == ((name, field) in NO_EFFECT)


def test_what_a1_s_smoothing_does():
    """It moves the threshold from 0.2 to 0.2 / 0.9, and so two shares of a mixed image apart."""
    a1 = PAPER.override(**RECIPES["a1"])
    smoothed, plain = (
        aim_of(recipe, 1000).loss for recipe in (a1, a1.override(label_smoothing=0.0))
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

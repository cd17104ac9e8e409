"""Joins a classifier's batches, step and evaluation, for the loop of utils.training.epochs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from utils.classification import engine
from utils.classification.outcome import CLASSIFICATION
from utils.classification.training_data import TrainingData
from utils.data.decoding import ON_DEVICE
from utils.data.loading import Batch, ImageDataset, Reading, training_batches, validation_batches
from utils.data.sampler import SeededBatches, mix_seed
from utils.data.transforms import eval_transform
from utils.data.validation_check import ValidationCheck
from utils.recipes.classification import Recipe
from utils.system import distributed
from utils.system.backends import AutocastFactory
from utils.system.distributed import Context
from utils.training.epochs import Task
from utils.training.progress import evaluation_progress, watched
from utils.training.state import RunState


@dataclass(frozen=True)
class TaskBatches:
    """Holds the order of training, and functions that begin a pass over train or val."""

    seed: int
    order: SeededBatches
    train: Callable[[], Iterator[Batch]]
    val: Callable[[], Iterator[Batch]]
    val_images: int
    check: ValidationCheck
    class_weights: tuple[float, ...] | None

    @classmethod
    def of(
        cls,
        data: TrainingData,
        recipe: Recipe,
        seed: int,
        reading: Reading,
        context: Context,
        skip_bad_images: bool,
    ) -> "TaskBatches":
        """Makes the batches of this rank."""
        rank, world_size = context.rank, context.world_size
        labels = data.train.labels if recipe.sampler == "balanced" else None
        order = SeededBatches(
            len(data.train), recipe.batch_size, seed, rank, world_size, recipe.repeats, labels
        )
        train = training_batches(data.train, order, recipe, seed, reading, skip_bad_images)
        val = validation_batches(data.val, recipe, reading, rank, world_size)
        decoder = "torchvision" if reading.decoder == ON_DEVICE else reading.decoder
        dataset = ImageDataset(data.val, eval_transform(recipe.img_size, recipe.crop_pct))
        check = ValidationCheck(
            lambda index: dataset.read((0, index), decoder), len(data.val), context
        )
        return cls(seed, order, train, val, len(data.val), check, data.class_weights)


def make_task(
    state: RunState,
    batches: TaskBatches,
    recipe: Recipe,
    autocast: AutocastFactory,
    print_freq: int,
    context: Context,
) -> Task:
    """Makes what `run_epochs` trains: the network in its parallel wrapping, step and evaluation."""
    weights = batches.class_weights
    if weights is not None:  # --num-classes may give outputs that no image is of
        weights += (1.0,) * (state.network.num_classes - len(weights))
    rule = engine.StepRule.of(
        recipe,
        batches.order.steps,
        mix_seed(batches.seed, context.rank),
        autocast,
        state.network.num_classes,
        None if weights is None else torch.tensor(weights, device=context.device),
    )
    wrapped = distributed.wrap(state.network, context, recipe.sync_bn)
    evaluated = distributed.data_parallel(state.evaluated, context)

    def steps(first_step: int) -> Iterator[Batch]:
        parts = (state.optimizer, state.scaler, state.meter, state.guard, rule)
        trained = engine.train_epoch(wrapped, batches.train(), *parts, first_step=first_step)
        return batches.check.beside(trained)

    def judge(stop: Callable[[], bool]) -> dict[str, float] | None:
        title = f"epoch {state.epoch + 1}/{recipe.epochs} val"
        progress = evaluation_progress(
            batches.val_images, recipe.batch_size, print_freq, context, title
        )
        shown = watched(batches.val(), progress)
        return engine.evaluate(evaluated, shown, context.device, autocast, stop)

    length = (recipe.epochs, recipe.batch_size, print_freq)
    early = partial(why_ended, recipe=recipe)
    check = batches.check
    rest = (*length, early, lambda: check.fault)
    return Task(CLASSIFICATION, batches.order, steps, judge, rule.lr_at, *rest)


def why_ended(state: RunState, recipe: Recipe) -> str | None:
    """Returns a line on a run that has no epoch left to do: all are done, or it ended early.

    None where there is one. That is no fault: a scheduler may start a finished run once more.
    """
    if state.epoch >= recipe.epochs:
        return f"all {recipe.epochs} epochs are done: give more with --epochs"
    waited = state.epochs_since_best(CLASSIFICATION)
    if recipe.early_stop and waited >= recipe.early_stop:
        return (
            f"stopped early, after {state.epoch} of {recipe.epochs} epochs: {waited} without a "
            "better top-1; to go on, give more with --early-stop, or 0 for all epochs"
        )
    return None

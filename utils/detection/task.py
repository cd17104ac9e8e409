"""Joins a detector's batches, step and evaluation, for the loop of utils.training.epochs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from utils.data.loading import Reading
from utils.data.sampler import mix_seed
from utils.data.validation_check import ValidationCheck
from utils.detection import engine
from utils.detection.batches import (
    DetectionBatch,
    GroupedBatches,
    ValidationSet,
    evaluation_batches,
    training_batches,
)
from utils.detection.coco_dataset import CocoDataset
from utils.detection.coco_evaluation import Result, Summary, judge
from utils.detection.outcome import DETECTION
from utils.detection.training_data import DetectionData
from utils.recipes.detection import DetectionRecipe, lr_at
from utils.system import distributed
from utils.system.backends import AutocastFactory
from utils.system.distributed import Context
from utils.training.epochs import Task
from utils.training.progress import evaluation_progress, watched
from utils.training.state import RunState

IMAGES = 10  # steps of an evaluation, of one image each, for one of training
Summaries = dict[str, Summary]  # of "bbox", and of "segm" where masks are judged


@dataclass
class Evaluation:
    """Evaluates a detector on the validation images, each once over all ranks.

    Args:
        val: images and objects.
        first_label: of the network's classes.
        autocast: the context of forward.
        print_freq: training steps between two lines of progress; here a step is one image of each
            rank, and there are IMAGES times as many between two lines.

    Attributes:
        results: of the last evaluation, in COCO's format; on rank 0 alone.
    """

    val: ValidationSet
    first_label: int
    reading: Reading
    autocast: AutocastFactory
    context: Context
    print_freq: int = 10
    results: Sequence[Result] = field(default=(), init=False)

    def __post_init__(self) -> None:
        rank, world_size = self.context.rank, self.context.world_size
        self.batches = evaluation_batches(
            self.val.split, self.first_label, self.reading, rank, world_size
        )
        dataset = CocoDataset(self.val.split, self.first_label)
        self.check = ValidationCheck(
            lambda index: dataset[0, index], len(self.val.split), self.context
        )

    def __call__(
        self,
        network: nn.Module,
        stop: Callable[[], bool] = lambda: False,
        title: str = "evaluation",
    ) -> Summaries | None:
        """Returns COCO's figures; None when `stop` said so. Call it on every rank.

        Args:
            title: of its progress.
        """
        progress = evaluation_progress(
            len(self.val.split),
            self.context.world_size,
            IMAGES * self.print_freq,
            self.context,
            title,
        )
        found = engine.detect(
            network,
            watched(self.batches(), progress),
            self.val.category_ids,
            self.first_label,
            self.autocast,
            stop,
        )
        if found is None:
            return None
        results, summaries = judge(found, self.val.truth, self.context)
        self.results = results or ()
        return summaries


def make_task(
    state: RunState,
    data: DetectionData,
    evaluation: Evaluation,
    recipe: DetectionRecipe,
    seed: int,
    print_freq: int,
) -> Task:
    """Makes what `run_epochs` trains: the network in its parallel wrapping, step and evaluation.

    Args:
        recipe: with a number for its learning rate.
        seed: of the run.
    """
    context, reading, autocast = evaluation.context, evaluation.reading, evaluation.autocast
    rank, world_size = context.rank, context.world_size
    order = GroupedBatches(data.train.sizes, recipe.batch_size, seed, rank, world_size)
    batches = training_batches(
        data.train, order, evaluation.first_label, recipe.hflip, seed, reading
    )
    rate = partial(lr_at, steps_per_epoch=order.steps, recipe=recipe)
    wrapped = distributed.wrap(state.network, context)

    def steps(first_step: int) -> Iterator[DetectionBatch]:
        trained = engine.train_epoch(
            wrapped,
            batches(),
            state.optimizer,
            state.meter,
            state.guard,
            first_step=first_step,
            lr_at=rate,
            clip=recipe.clip,
            seed=mix_seed(seed, rank),
            autocast=autocast,
            scaler=state.scaler,
        )
        return evaluation.check.beside(trained)

    def judged(stop: Callable[[], bool]) -> Summaries | None:
        return evaluation(state.network, stop, f"epoch {state.epoch + 1}/{recipe.epochs} val")

    length, check = (recipe.epochs, recipe.batch_size, print_freq), evaluation.check
    return Task(DETECTION, order, steps, judged, rate, *length, fault=lambda: check.fault)

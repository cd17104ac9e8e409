"""One epoch of a classifier, on a network small enough to follow by hand."""

import contextlib

import torch
from torch import nn

from main import RECIPE as RECIPE_OF_MAIN
from utils.config.classification import NetworkSettings
from utils.data.loader import Batch
from utils.runs.resume import Start
from utils.runs.writer import RunFiles
from utils.system.distributed import Context, Votes
from utils.system.signals import StopRequest
from utils.training import classifier
from utils.training.classification import (
    ClassificationMeter,
    Objective,
    cross_entropy,
    train_one_epoch,
    unmixed,
)
from utils.training.optim import StepRule
from utils.training.progress import Progress
from utils.training.state import NonFiniteGuard, TrainingState

CPU = torch.device("cpu")
ALONE = Context(CPU)
PLAIN = contextlib.nullcontext
STEPS = 8  # of an epoch
# The learning rate is 0.1 for 30 epochs.
RECIPE = RECIPE_OF_MAIN.override(arch="eca_resnet18", batch_size=6, weight_decay=0.0)


def batches(count=4, size=6, classes=3):
    torch.manual_seed(9)
    return [Batch(torch.randn(size, 5), torch.randint(classes, (size,)), ()) for _ in range(count)]


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))


def sgd(net, **kwargs):
    return torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, **kwargs)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def begin_state(net, recipe, amp="off", context=ALONE) -> TrainingState:
    """Returns the state in which a new run begins."""
    net.num_classes = getattr(net, "num_classes", 3)
    flags, start = NetworkSettings(amp=amp), Start(None, None, None)
    return classifier.begin_state(net, recipe, flags, start, context)


def train(
    net,
    given,
    first_step=0,
    guard=None,
    optimizer=None,
    seed=7,
    scaler=NO_SCALER,
    loss_fn=cross_entropy,
    mix=unmixed,
    state=None,
    autocast=PLAIN,
    progress=None,
    run=None,
    stop=None,
    rule=None,
    aim=None,
    **recipe,
):
    """Trains by batches of an epoch, from the run's step `first_step` on.

    A `state` brings its own step, and what else it holds; `rule` and `aim` what the recipe's
    values give.
    Without `progress` no step is shown, and without `run` nothing is written.

    Returns:
        The state behind them, and whether the epoch is done.
    """
    if state is None:
        state = TrainingState(
            net,
            optimizer or sgd(net),
            scaler,
            ClassificationMeter(CPU, 3),
            guard or NonFiniteGuard(CPU, "loss or gradient" if "clip_grad" in recipe else "loss"),
        )
        state.epoch, state.step = divmod(first_step, STEPS)
    rule = rule or StepRule(RECIPE.override(**recipe), STEPS, seed, autocast)
    aim = aim or Objective(loss_fn, mix)
    progress = progress or Progress("epoch", 10**6, 6, 10**6)
    run, stop = run or RunFiles(None, {}), StopRequest() if stop is None else stop
    done = train_one_epoch(state, net, given, rule, aim, progress, run, Votes(None), stop)
    return state, done

"""One epoch of a classifier, on a network small enough to follow by hand."""

import contextlib

import torch
from torch import nn

from utils.classification.engine import StepRule, train_epoch
from utils.classification.metrics import ClassificationMeter
from utils.data.loading import Batch
from utils.training.finite_guard import NonFiniteGuard

CPU = torch.device("cpu")
PLAIN = contextlib.nullcontext


def batches(count=4, size=6, classes=3):
    torch.manual_seed(9)
    return [Batch(torch.randn(size, 5), torch.randint(classes, (size,)), ()) for _ in range(count)]


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))


def sgd(net, **kwargs):
    return torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, **kwargs)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def train(
    net,
    given,
    first_step=0,
    lr_at=lambda step: 0.1,
    guard=None,
    optimizer=None,
    seed=7,
    scaler=NO_SCALER,
    **rule,
):
    meter = ClassificationMeter(CPU)
    passed = list(
        train_epoch(
            net,
            given,
            optimizer or sgd(net),
            scaler,
            meter,
            guard or NonFiniteGuard(CPU),
            StepRule(lr_at, seed, PLAIN, **rule),
            first_step,
        )
    )
    return meter, passed

"""Chooses the layers of a detector's backbone that train, and what its BatchNorm does."""

from collections.abc import Sequence
from typing import Any

from torch import nn

NORMS = ("eval", "frozen", "bn", "sync")
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that uses its stored statistics in training too.

    `requires_grad=False` fixes weight and bias alone: after `train()` the statistics would change.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.train()

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        return super().train(False)


def set_norm(body: nn.Module, norm: str, trained: Sequence[str]) -> None:
    """Makes the BatchNorms of `body` behave as `norm` says, in place; all names stay.

    Args:
        body: a network with the children `STAGES`.
        norm: "eval": statistics fixed, weight and bias trained, as the authors did; "frozen": all
            fixed; "bn": all change; "sync": as "bn", with statistics over all processes.
        trained: the stages that train; the statistics of the others are fixed for any `norm`.

    Raises:
        ValueError: for another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, such as eval, not {norm!r}")
    for name in STAGES:
        stage = nn.Sequential(getattr(body, name))  # a parent, as bn1 is itself a BatchNorm
        if norm in ("eval", "frozen") or name not in trained:
            _fix_statistics(stage)
        elif norm == "sync":
            stage = nn.SyncBatchNorm.convert_sync_batchnorm(stage)
        if norm == "frozen":
            for module in stage.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        setattr(body, name, stage[0])


def _fix_statistics(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FixedBatchNorm2d(child.num_features, child.eps, child.momentum)
            fixed._parameters, fixed._buffers = child._parameters, child._buffers
            setattr(module, name, fixed)
        else:
            _fix_statistics(child)


def freeze(network: nn.Module, trainable_layers: int, norm: str) -> None:
    """Leaves the last `trainable_layers` of the network trainable, with BatchNorm as `norm` says.

    Args:
        network: a ResNet of this project; see `set_norm`.
        trainable_layers: 3 trains layer2 to layer4, 4 layer1 too, 5 all, 0 nothing.

    Raises:
        ValueError: for another number or `norm`.
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be 0 to 5, such as 3, not {trainable_layers}")
    trained = STAGES if trainable_layers == 5 else STAGES[6 - trainable_layers :]
    for name in STAGES:
        getattr(network, name).requires_grad_(name in trained)
    set_norm(network, norm, trained)

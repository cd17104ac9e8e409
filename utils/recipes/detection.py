"""Holds a detector's training recipe as one frozen value, and computes its learning rate."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

AUTO = "auto"
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class DetectionRecipe:
    """Holds the numbers of a detection run. The defaults are the paper's for COCO.

    Epochs count from 0; the batch is the global one, whatever the number of devices.
    """

    arch: str = "faster_rcnn"
    backbone: str = "eca_resnet50"
    epochs: int = 12
    batch_size: int = 8
    optimizer: str = "sgd"
    lr: float | str = AUTO
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4
    lr_steps: tuple[int, ...] = (8, 11)  # finished epochs after which the rate decays
    lr_decay: float = 0.1
    warmup_steps: int = 500
    warmup_factor: float = 1 / 3  # of the rate, at the first step
    clip: float = 35.0  # gradient norm
    min_size: int = 800
    max_size: int = 1333
    hflip: float = 0.5
    settings: dict[str, Any] = field(default_factory=dict)  # further arguments of the network

    def override(self, **values: Any) -> "DetectionRecipe":
        """Returns a recipe with the given values; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    def resolved(self) -> "DetectionRecipe":
        """Returns the recipe with a number for "auto": the paper's 0.01, scaled with its batch of
        8.
        """
        return replace(self, lr=0.01 * self.batch_size / 8) if self.lr == AUTO else self

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectionRecipe":
        """Returns the recipe saved with a run; a field that the file lacks takes its default."""
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in values.items() if k in known}
        if "lr_steps" in kept:
            kept["lr_steps"] = tuple(kept["lr_steps"])
        return cls(**kept)


def lr_at(step: int, steps_per_epoch: int, recipe: DetectionRecipe) -> float:
    """Returns the learning rate of one optimizer step, `step` being the steps done so far.

    The warm-up is a factor on top of the schedule, rising in equal parts from `warmup_factor` at
    the first step to 1 at step `warmup_steps`.
    """
    rate = recipe.lr
    if step < recipe.warmup_steps:
        rate *= 1 - (1 - recipe.warmup_factor) * (1 - step / recipe.warmup_steps)
    decays = sum(step >= epoch * steps_per_epoch for epoch in recipe.lr_steps)
    return rate * recipe.lr_decay**decays

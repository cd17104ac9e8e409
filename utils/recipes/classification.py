"""Holds a training recipe as one frozen value: a script's defaults, changed by flags."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

LOSSES = ("ce", "bce")
OPTIMIZERS = ("sgd", "adamw", "lamb")


@dataclass(frozen=True)
class Recipe:
    """Holds the numbers of a classification run. Each field is a flag of the same name.

    Epochs count from 0; the batch is the global one, whatever the number of devices.
    """

    arch: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str  # "step", "exp" or "cosine", see utils.recipes.schedules
    lr_step: int = 30
    lr_decay: float = 0.1
    warmup_epochs: float = 0.0
    img_size: int = 224
    crop_pct: float = 0.875  # evaluation: 224 out of 256
    min_scale: float = 0.08  # training: the smallest crop's share of the area
    hflip: float = 0.5
    # Parts of the modern recipes, off unless asked for: a run saved before they existed is itself.
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution of the shares; 0: no mixup
    cutmix: float = 0.0  # likewise; with both, each batch takes one of them by even chance
    auto_augment: str = "none"  # see utils.data.transforms
    random_erasing: float = 0.0  # probability
    ema: float = 0.0  # decay per step of the averaged weights; 0: none
    norm_decay: bool = True  # weight decay on norms, biases and ECA kernels, too
    repeats: int = 1  # copies of each image in a batch, each with its own augmentation
    train_size: int = 0  # pixels of training crops; 0: img_size
    accumulate: int = 1  # parts of a device's batch, taken one after the other
    clip_grad: float = 0.0  # largest norm of the gradient; 0: any
    sync_bn: bool = False  # BatchNorm's statistics over all processes
    sampler: str = "shuffle"  # or "balanced": each class alike, see utils.data.sampler
    loss: str = "ce"  # cross-entropy; or "bce", each class a question of its own
    bce_threshold: float = 0.0  # shares of a class above it count as 1, others as 0; 0: as they are
    drop_path: float = 0.0  # stochastic depth: probability that an image skips the last block
    optimizer: str = "sgd"  # or "adamw", "lamb", to which momentum means nothing
    layer_decay: float = 1.0  # factor of the learning rate from each block to the one before it
    freeze: str = "none"  # or "backbone", "stages:N": the first layers, which do not train
    early_stop: int = 0  # epochs without a better top-1 after which training ends; 0: never

    @property
    def crop_size(self) -> int:
        """Returns the side of a training image in pixels; `img_size` is that of evaluation."""
        return self.train_size or self.img_size

    def override(self, **values) -> "Recipe":
        """Returns a recipe with the given values; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Returns the recipe saved with a run; a field that the file lacks takes its default."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})


# What --recipe changes of a script's own recipe, the paper's. docs/RECIPES.md gives every number's
# source. MODERN is torchvision's for its V2 weights; MODERN_100 a hundred epochs with the weaker
# regularisation of timm's A3.
MODERN = MappingProxyType(
    {
        "epochs": 600,
        "batch_size": 1024,
        "lr": 0.5,
        "weight_decay": 2e-5,
        "norm_decay": False,
        "schedule": "cosine",
        "warmup_epochs": 5.0,
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "cutmix": 1.0,
        "auto_augment": "trivial",
        "random_erasing": 0.1,
        "repeats": 4,
        "ema": 0.99997,
        "train_size": 176,
        "crop_pct": 224 / 232,
    }
)
MODERN_100 = MappingProxyType(
    {
        "epochs": 100,
        "batch_size": 1024,
        "lr": 0.5,
        "weight_decay": 1e-4,
        "norm_decay": False,
        "schedule": "cosine",
        "warmup_epochs": 5.0,
        "mixup": 0.1,
        "cutmix": 1.0,
        "auto_augment": "rand",
        "ema": 0.9998,
        "train_size": 160,
        "crop_pct": 0.95,
    }
)
# ResNet strikes back (Wightman et al. 2021), table 2.
A1 = MappingProxyType(
    {
        "epochs": 600,
        "batch_size": 2048,
        "optimizer": "lamb",
        "lr": 5e-3,
        "weight_decay": 0.01,
        "norm_decay": False,
        "schedule": "cosine",
        "warmup_epochs": 5.0,
        "loss": "bce",
        "bce_threshold": 0.2,
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "cutmix": 1.0,
        "auto_augment": "rand-m7-mstd0.5-inc1",
        "repeats": 3,
        "drop_path": 0.05,
        "crop_pct": 0.95,
    }
)
A2 = MappingProxyType(
    {**A1, "epochs": 300, "weight_decay": 0.02, "label_smoothing": 0.0, "mixup": 0.1}
)
A3 = MappingProxyType(
    {
        **A2,
        "epochs": 100,
        "lr": 8e-3,
        "auto_augment": "rand-m6-mstd0.5-inc1",
        "repeats": 1,
        "drop_path": 0.0,
        "train_size": 160,
    }
)
PAPER = "paper"
RECIPES = MappingProxyType(
    {
        PAPER: MappingProxyType({}),
        "modern": MODERN,
        "modern100": MODERN_100,
        "a1": A1,
        "a2": A2,
        "a3": A3,
    }
)

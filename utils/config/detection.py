"""The configuration of detect_main.py: a recipe, and how it is run on this machine.

`DetectionRecipe` holds what decides a run's results, as `Recipe` does for classifiers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import models
from models.detection.detectors import DETECTORS
from models.detection.layers import NORMS
from utils.config.flags import (
    ANY_TIME,
    NEVER,
    SWITCH,
    YES_NO,
    BaseConfig,
    BaseRecipe,
    ComputeSettings,
    LoaderSettings,
    RunSettings,
    count,
    data_flag,
    network_flag,
    number,
    one_of,
    positive_float,
    positive_int,
    run_flag,
    share,
    training_flag,
)

AUTO = "auto"
OPTIMIZERS = ("sgd", "adamw")
BACKBONES = tuple(name for name in models.MODELS if "resnet" in name)


def learning_rate(text: str) -> float | str:
    """Checks --lr, as an argparse type: a number, or "auto"."""
    return text if text == AUTO else positive_float(text)


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(BaseRecipe):
    """Holds the numbers that decide a detection run's results; each field but two is a flag.

    The defaults are the paper's for COCO.
    """

    epochs: int = 12
    momentum: float = 0.9
    weight_decay: float = 1e-4

    # fmt: off
    arch: str = network_flag(
        "-a", "--arch", default="faster_rcnn", choices=tuple(DETECTORS), first=True, help="detector"
    )
    backbone: str = network_flag(
        "-b", "--backbone", default="eca_resnet50", kind=one_of(BACKBONES, "backbone"),
        metavar="NAME", first=True, help="a ResNet of this project"
    )
    batch_size: int = training_flag(
        "--batch-size", default=8, kind=positive_int, first=True, trains=True,
        help="global batch, over all devices (-b is the backbone, as in the published commands)"
    )
    optimizer: str = training_flag(
        "--optimizer", default="sgd", choices=OPTIMIZERS, trains=True, resume=NEVER,
        help="adamw learns quicker without pretrained weights"
    )
    lr: float | str = training_flag(
        "--lr", default=AUTO, kind=learning_rate, first=True, trains=True, resume=ANY_TIME,
        help="learning rate; auto: 0.01 for each 8 images of a batch"
    )
    lr_steps: tuple[int, ...] = training_flag(
        "--lr-steps", default=(8, 11), kind=positive_int, nargs="+", trains=True, resume=ANY_TIME,
        help="finished epochs after which the rate decays"
    )
    lr_decay: float = training_flag(
        "--lr-decay", default=0.1, kind=share, trains=True, resume=ANY_TIME,
        help="factor of a decay"
    )
    warmup_steps: int = training_flag(
        "--warmup-steps", default=500, kind=count, trains=True, resume=ANY_TIME,
        help="rise of the rate from a third of it"
    )
    warmup_factor: float = 1 / 3  # of the rate, at the first step
    clip: float = training_flag(
        "--clip", default=35.0, kind=positive_float, trains=True, resume=ANY_TIME,
        help="largest gradient norm"
    )
    min_size: tuple[int, ...] = data_flag(
        "--min-size", default=(800,), kind=positive_int, nargs="+", metavar="S",
        help="pixels of an image's shorter side; of several, training draws one for each image, "
        "and evaluation takes the last"
    )
    max_size: int = data_flag(
        "--max-size", default=1333, kind=positive_int, metavar="S",
        help="most pixels of the longer side"
    )
    settings: dict[str, Any] = field(default_factory=dict)  # further arguments of the network

    def resolved(self) -> "DetectionRecipe":
        """Returns the recipe with a number for "auto": the paper's 0.01, scaled with its batch of
        8.
        """
        return replace(self, lr=0.01 * self.batch_size / 8) if self.lr == AUTO else self

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Returns the learning rate of one optimizer step; see `BaseRecipe.lr_at`.

        The warm-up is a factor on top of the schedule, rising in equal parts from `warmup_factor`
        at the first step to 1 at step `warmup_steps`.
        """
        rate = float(self.resolved().lr)
        if step < self.warmup_steps:
            rate *= 1 - (1 - self.warmup_factor) * (1 - step / self.warmup_steps)
        decays = sum(step >= epoch * steps_per_epoch for epoch in self.lr_steps)
        return rate * self.lr_decay**decays

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectionRecipe":
        """Returns the recipe saved with a run; a field that the file lacks takes its default.

        Raises:
            ValueError: a field that is no flag cannot be used.
        """
        factor, settings = values.get("warmup_factor", 1 / 3), values.get("settings", {})
        if not isinstance(factor, float) or not 0 < factor <= 1 or not isinstance(settings, dict):
            raise ValueError("the saved recipe's warmup_factor or settings cannot be used")
        return super().from_dict(values)


@dataclass(frozen=True)
class DetectionDataSettings(LoaderSettings):
    """Holds where images and annotations are, and how this machine reads them."""

    # fmt: off
    train_images: str | None = data_flag(
        "--train-images", default=None, metavar="DIR", trains=True,
        help="in DATA, instead of train2017"
    )
    train_annotations: str | None = data_flag(
        "--train-annotations", default=None, metavar="FILE", trains=True,
        help="in DATA, instead of annotations/instances_train2017.json"
    )
    val_images: str | None = data_flag(
        "--val-images", default=None, metavar="DIR", help="in DATA, instead of val2017"
    )
    val_annotations: str | None = data_flag(
        "--val-annotations", default=None, metavar="FILE",
        help="in DATA, instead of annotations/instances_val2017.json"
    )
    drop_empty: bool = data_flag(
        "--drop-empty", default=False, kind=YES_NO, trains=True,
        help="leave images without objects out of training (otherwise they train as background)"
    )
    images_anywhere: bool = data_flag(
        "--images-anywhere", default=False, kind=SWITCH, saved=False,
        help="images may lie outside of their folder: links, '..' and absolute names in the "
        "annotations are followed (otherwise refused)"
    )
    # fmt: on


@dataclass(frozen=True)
class DetectorSettings(ComputeSettings):
    """Holds a detector's form and first weights, and how it runs on this machine."""

    # fmt: off
    backbone_weights: str | None = network_flag(
        "--backbone-weights", default=None, metavar="CKPT", first=True, saved=False, trains=True,
        help="start from a checkpoint of main.py, or a released one"
    )
    detector_weights: str | None = network_flag(
        "--detector-weights", default=None, metavar="CKPT", saved=False, trains=True,
        help="start from a detector of this program, also one of other classes: the layers with an "
        "output for each class are new then"
    )
    norm: str | None = network_flag(
        "--norm", default=None, choices=tuple(NORMS),
        help="BatchNorm of the backbone: eval (statistics fixed, affine trained), frozen (both "
        "fixed), bn, sync (default: eval with weights to start from, else bn)"
    )
    trainable_layers: int | None = network_flag(
        "--trainable-layers", default=None, kind=number(int, 0, 5),
        help="0 to 5: 3 trains layer2 to layer4 (default: 3 with weights to start from, else 5)"
    )
    legacy: bool = network_flag(
        "--legacy", default=False, kind=SWITCH,
        help="mmdetection v1's geometry (imported checkpoints bring it along)"
    )
    channels_last: bool | None = training_flag(
        "--channels-last", default=None, kind=YES_NO,
        help="NHWC memory format (default: on the CPU, where it is several times quicker)"
    )
    # fmt: on


@dataclass(frozen=True)
class DetectionRun(RunSettings):
    """Holds what a start of detect_main.py does, and where it writes."""

    # fmt: off
    results_json: str | None = run_flag(
        "--results-json", default=None, metavar="FILE", saved=False, needs={"evaluate": (True,)},
        help="with -e: write the detections in COCO's result format"
    )
    picture: str | None = run_flag(
        "--picture", default=None, metavar="FILE", first=True, saved=False,
        needs={"evaluate": (True,)},
        help="with -e: draw detections beside the ground truth of some images"
    )
    report: bool = run_flag(
        "--report", default=False, kind=SWITCH, saved=False, needs={"evaluate": (True,)},
        help="with -e: write AP, AP50 and recall by class, precision-recall curves and the worst "
        "images to report/, in --output or beside the run's checkpoint"
    )
    # fmt: on


@dataclass(frozen=True)
class DetectionConfig(BaseConfig):
    """Holds a start of detect_main.py: the recipe, and how it is run; see `BaseConfig`."""

    recipe: DetectionRecipe
    data: DetectionDataSettings
    network: DetectorSettings
    run: DetectionRun

"""Holds a start of a training script as one frozen value: every flag that is no recipe field."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from utils.options.common import OF_ONE_START

AnySettings = TypeVar("AnySettings", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Holds the settings of both scripts. Each field but the last two is a flag of the same name.

    Args:
        typed: the flags as they were typed, before a resumed run's own came in.
        saved_flags: those that a checkpoint keeps.
    """

    data: str
    workers: int
    worker_timeout: float
    ksize: str | None
    amp: str
    fused: bool
    evaluate: bool
    check_val: bool
    resume: str | None
    output: str | None
    action: str | None
    print_freq: int
    save_every: int | None
    save_minutes: float | None
    seed: int | None
    device: str
    gpu: int | None
    typed: Mapping[str, Any]
    saved_flags: Mapping[str, Any]

    @classmethod
    def of(cls: type[AnySettings], args: Namespace, typed: Namespace) -> AnySettings:
        """Makes the settings of a parsed command line, and of what was typed."""
        values = vars(args)
        own = {
            f.name: values[f.name] for f in fields(cls) if f.name not in ("typed", "saved_flags")
        }
        saved_flags = {name: value for name, value in values.items() if name not in OF_ONE_START}
        return cls(**own, typed=dict(vars(typed)), saved_flags=saved_flags)

    @property
    def source(self) -> str:
        """Returns the file that the run begins with, as the command line named it, for messages."""
        return str(self.resume)


@dataclass(frozen=True)
class ClassificationSettings(Settings):
    """Holds the further settings of main.py and light_main.py."""

    data_files: str | None
    download: bool
    decoder: str
    skip_bad_images: bool
    class_weights: str | None
    attention: str | None
    num_classes: int | None
    pretrained: str | None
    identity_start: bool
    recipe: str | None
    start_epoch: int | None
    report: bool
    channels_last: bool
    compile: bool
    grad_checkpointing: bool
    fast: bool
    class_names: str | None
    present_classes: bool
    real_labels: str | None

    @property
    def source(self) -> str:
        return str(self.resume or self.pretrained)


@dataclass(frozen=True)
class DetectionSettings(Settings):
    """Holds the further settings of detect_main.py. A size of None means the checkpoint's own."""

    train_images: str | None
    train_annotations: str | None
    val_images: str | None
    val_annotations: str | None
    drop_empty: bool
    images_anywhere: bool
    min_size: int | None
    max_size: int | None
    norm: str | None
    trainable_layers: int | None
    legacy: bool
    backbone_weights: str | None
    detector_weights: str | None
    channels_last: bool | None
    results_json: str | None
    picture: str | None

"""Builds the detector of a run, with first or saved weights, and says how it runs."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from models.detection.detectors import (
    FIRST_LABEL,
    LOSSES,
    describe_detector,
    refuse_another_network,
    start_detector,
    start_from_detector,
)
from utils.config.detection import (
    AUTO,
    DetectionConfig,
    DetectionDataSettings,
    DetectionRecipe,
    DetectorSettings,
)
from utils.data.loader import Loader
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import Start
from utils.system import backends
from utils.system.distributed import Context, device_lines
from utils.system.errors import UserError, as_user_error
from utils.system.text import counted
from utils.training.detection import LossMeter
from utils.training.detection_data import DetectionData
from utils.training.optim import make_optimizer
from utils.training.state import NonFiniteGuard, TrainingState

CHECKED = "loss or gradient"
WARMUP = "--warmup-steps"  # what a remedy calls it
OF_A_NETWORK = ("arch", "backbone", "ksize", "norm", "trainable_layers", "legacy")


def network_line(network: Any) -> str:
    """Returns one line: detector, backbone, parameters, kernel sizes, what trains."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    ksize = f"ksize {','.join(map(str, network.ksize))}" if network.ksize else "no ECA"
    legacy = ", mmdetection v1's geometry" if network.model_kwargs["legacy"] else ""
    return (
        f"network: {network.arch} on {network.backbone_arch}, {ksize}, {trained:,} trained "
        f"parameters, norm {network.model_kwargs['norm']}{legacy}"
    )


def recipe_line(recipe: DetectionRecipe) -> str:
    """Returns the numbers of training."""
    scaled = " (auto: 0.01 for 8 images)" if recipe.lr == AUTO else ""
    decays = ", ".join(map(str, recipe.lr_steps))
    momentum = f", momentum {recipe.momentum:g}" if recipe.optimizer == "sgd" else ""
    return (
        f"recipe: {counted(recipe.epochs, 'epoch')}, batch {recipe.batch_size}, "
        f"{recipe.optimizer} lr {recipe.resolved().lr:g}{scaled} times {recipe.lr_decay:g} after "
        f"epochs {decays}, warm-up {counted(recipe.warmup_steps, 'step')}{momentum}, weight decay "
        f"{recipe.weight_decay:g}, clip {recipe.clip:g}, sides "
        f"{'/'.join(map(str, recipe.min_size))} to {recipe.max_size}"
    )


def build_network(
    recipe: DetectionRecipe,
    flags: DetectorSettings,
    start: Start,
    classes: list[str],
    context: Context,
) -> tuple[nn.Module, list[str]]:
    """Makes the detector that is trained, with its first or saved weights, on its device.

    Returns:
        The network, and lines about it and how it runs.

    Raises:
        UserError: flags, classes and weights do not fit together, or not the device.
    """
    with as_user_error():
        network, notes = _with_weights(recipe, flags, start, classes)
    norm = describe_detector(network)["model_kwargs"]["norm"]
    if norm == "sync" and context.device.type != "cuda":
        raise UserError("--norm sync runs on CUDA alone: give --norm bn")
    lines = [network_line(network), *notes, *how_it_runs(network, flags, context)]
    to_device(network, flags, context)
    return network, lines


def _with_weights(
    recipe: DetectionRecipe, flags: DetectorSettings, start: Start, classes: list[str]
) -> tuple[nn.Module, list[str]]:
    first = start.pretrained
    shorter: Any = recipe.min_size if len(recipe.min_size) > 1 else recipe.min_size[0]
    sizes: dict[str, Any] = {"min_size": shorter, "max_size": recipe.max_size}
    outputs = len(classes) + FIRST_LABEL[recipe.arch]
    if start.saved is not None:
        return start.saved.detector(**sizes), []
    trained: dict[str, Any] = {"norm": flags.norm, "trainable_layers": flags.trainable_layers}
    if flags.detector_weights and first is not None:
        with as_user_error(f"{first.file}: "):
            network, note = start_from_detector(
                first.contents, outputs, classes, **trained, **sizes, **recipe.settings
            )
        return network, [note]
    network, note = start_detector(
        recipe.arch,
        recipe.backbone,
        flags.ksize,
        outputs,
        None if first is None else first.contents,
        **trained,
        legacy=flags.legacy,
        **sizes,
        **recipe.settings,
    )
    return network, [note]


def read_first_weights(flags: DetectorSettings, network_flags: dict[str, Any]) -> Checkpoint | None:
    """Reads the file that --backbone-weights or --detector-weights names, if one does.

    Args:
        network_flags: those of `OF_A_NETWORK` that were typed, None for the others.

    Raises:
        UserError: the file holds another detector than the flags ask for.
    """
    file = flags.backbone_weights or flags.detector_weights
    if not file:
        return None
    first = Checkpoint.read(Path(file))
    if flags.detector_weights:
        if not first.is_detector:
            raise UserError(f"{file}: no detector's checkpoint; give one of detect_main.py")
        # How its layers train is this run's own choice.
        typed = {**network_flags, "norm": None, "trainable_layers": None}
        with as_user_error(f"{file} "):
            refuse_another_network(first.contents, typed)
    return first


def is_channels_last(flags: DetectorSettings, context: Context) -> bool:
    """Returns whether the layout is NHWC: as typed, or on the CPU, where NCHW is far slower."""
    return context.device.type == "cpu" if flags.channels_last is None else flags.channels_last


def how_it_runs(network: nn.Module, flags: DetectorSettings, context: Context) -> list[str]:
    """Says on which device a detector runs, in which precision, and how the ends of blocks do."""
    dtype = backends.DTYPES[flags.amp]
    tails = models.describe_tails(network, context.device, flags.fused, dtype)
    last = is_channels_last(flags, context)
    return device_lines(context, flags.amp, last, compiled=False, tails=tails)


def to_device(network: nn.Module, flags: DetectorSettings, context: Context) -> None:
    """Puts the network on its device in its layout."""
    last = is_channels_last(flags, context)
    layout = torch.channels_last if last else torch.contiguous_format
    network.to(context.device).to(memory_format=layout)
    models.set_fused(network, flags.fused)


def loader_of(data: DetectionDataSettings, context: Context) -> Loader:
    """Returns how files become batches on the device."""
    assert data.workers is not None  # the command line has chosen a number
    return Loader(context.device, data.workers, data.worker_timeout)


def begin_state(
    network: nn.Module,
    recipe: DetectionRecipe,
    flags: DetectorSettings,
    start: Start,
    context: Context,
) -> TrainingState:
    """Makes all that changes in training, as it was saved where a run goes on.

    Args:
        network: on its device, with its first weights, without any parallel wrapping.
    """
    device, rate = context.device, float(recipe.resolved().lr)
    optimizer = make_optimizer(
        recipe.optimizer, network, rate, recipe.momentum, recipe.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=flags.amp == "fp16")
    meter, guard = LossMeter(device, LOSSES[recipe.arch]), NonFiniteGuard(device, CHECKED, WARMUP)
    state = TrainingState(network, optimizer, scaler, meter, guard, context.rank)
    if start.run is not None:
        state.restore(start.run)
    return state


def record_of(
    network: nn.Module, config: DetectionConfig, seed: int, data: DetectionData
) -> dict[str, Any]:
    """Returns what every checkpoint of a run holds besides the state, but for the environment.

    The recipe is as typed, with lr "auto", so that a resumption may have another batch.
    """
    return {
        **describe_detector(network),
        "classes": data.train.classes,
        "category_ids": data.train.category_ids,
        **config.record(seed, len(data.train), data.digest),
    }

"""Builds a classifier for main.py, with first or saved weights, and reports on it."""

import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import models
from assembly.exported_file import ExportedFile
from models import start as start_weights
from models import weights
from models.weights import Network
from utils.classification import engine, report
from utils.classification.evaluation_data import EvaluationData, open_evaluation_data
from utils.classification.metrics import ClassificationMeter
from utils.classification.state import first_state
from utils.classification.training_data import TrainingData
from utils.data.gpu_decoding import reading_of
from utils.data.loading import Reading, validation_batches
from utils.options.settings import ClassificationSettings
from utils.recipes.classification import PAPER, Recipe
from utils.runs.resume import Start
from utils.runs.saved_run import Checkpoint
from utils.system import backends, distributed
from utils.system.distributed import Context
from utils.system.errors import as_user_error
from utils.training.device_report import device_lines
from utils.training.progress import evaluation_progress, watched
from utils.training.state import RunState


def first_network(
    asked: Namespace | ClassificationSettings,
    recipe: Recipe,
    pretrained: Checkpoint | None,
    classes: Sequence[str] | None = None,
) -> tuple[Network, list[str]]:
    """Makes a new run's network.

    Args:
        asked: the flags.
        pretrained: the file of first weights, or None.
        classes: names of the data's classes; None where they are not known yet.

    Returns:
        The network, and lines that say what became of the weights.

    Raises:
        UserError: flags, classes and weights do not fit together.
    """
    with as_user_error():
        network, notes = start_weights.first_network(
            recipe.arch,
            asked.num_classes,
            asked.ksize,
            asked.attention,
            None if pretrained is None else pretrained.contents,
            asked.pretrained or "",
            classes,
            asked.identity_start,
        )
    return _with_trained_parts(network, recipe), notes


def _with_trained_parts(network: Network, recipe: Recipe) -> Network:
    """Returns the network with stochastic depth and frozen layers as the recipe wants them."""
    models.set_drop_path(network, recipe.drop_path)
    if recipe.freeze != "none":
        with as_user_error("--freeze: "):
            models.freeze(network, recipe.freeze)
    return network


def refuse_another(saved: Checkpoint, source: str, asked: Namespace) -> None:
    """Refuses flags that ask for another network than the one that a checkpoint holds.

    Args:
        source: the checkpoint, as the command line named it.
        asked: the flags.
    """
    wanted = (asked.arch, asked.ksize, asked.attention, asked.num_classes)
    with as_user_error():
        start_weights.refuse_another(saved.contents, source, *wanted)


def build_network(
    settings: ClassificationSettings, recipe: Recipe, start: Start, classes: Sequence[str]
) -> tuple[Network, list[str]]:
    """Makes the network that is trained, with its first or saved weights, and lines about it."""
    if start.saved is None:
        network, notes = first_network(settings, recipe, start.pretrained, classes)
    else:
        with as_user_error():
            network, notes = weights.network_from_checkpoint(start.saved.contents), []
        _with_trained_parts(network, recipe)
    return network, [report.network_line(network), *notes]


def saved_network(
    saved: Checkpoint, settings: ClassificationSettings, context: Context
) -> tuple[nn.Module, list[str]]:
    """Makes the network that is evaluated, of a checkpoint or a file of export.py.

    Returns:
        The network, and lines about it and about how it runs.
    """
    if isinstance(saved, ExportedFile):
        return saved.network, [saved.network.describe(), *saved.how_it_runs(context)]
    with as_user_error(f"{saved.file}: "):
        network = weights.network_from_checkpoint(saved.contents)
    return network, [report.network_line(network), *how_it_runs(network, settings, context)]


def how_it_trains(
    network: Network, settings: ClassificationSettings, recipe: Recipe, context: Context
) -> list[str]:
    """Says where and how a network is trained."""
    lines = [
        *how_it_runs(network, settings, context, recipe.sync_bn),
        *report.recipe_lines(recipe, settings.recipe or PAPER),
    ]
    if settings.grad_checkpointing:
        lines.append("  gradient checkpointing: backward computes each block again")
    return lines


def how_it_runs(
    network: Network,
    settings: ClassificationSettings,
    context: Context,
    sync_bn: bool = False,
) -> list[str]:
    """Says on which device a network runs, in which precision, and how the ends of its blocks do.

    Call it before `place`, which may compile the network.
    """
    tails = ""
    if not settings.fast:
        dtype = backends.DTYPES[settings.amp]
        tails = models.describe_tails(
            network, context.device, settings.fused, dtype, settings.compile, sync_bn
        )
    return device_lines(context, settings.amp, settings.channels_last, settings.compile, tails)


def place(network: nn.Module, settings: ClassificationSettings, context: Context) -> Reading:
    """Puts the network on its device in its layout, and says how its batches are to be read."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    network.to(context.device).to(memory_format=layout)
    models.set_fused(network, settings.fused)
    if settings.grad_checkpointing:
        cast(Network, network).set_grad_checkpointing()
    if settings.compile and not settings.fast:
        network.compile()
    reading = reading_of(settings.decoder)
    return reading(
        context.device, settings.workers, settings.worker_timeout, settings.decoder, layout
    )


def open_evaluation(
    data: str | Path, saved: Checkpoint, network: nn.Module, settings: ClassificationSettings
) -> EvaluationData:
    """Opens the images on which a checkpoint's network is evaluated; `data` is their folder."""
    asked = (settings.class_names, settings.present_classes, settings.real_labels)
    outputs = cast(Network, network).num_classes
    return open_evaluation_data(str(data), saved, outputs, *asked)


def judge(
    network: nn.Module,
    data: EvaluationData,
    recipe: Recipe,
    settings: ClassificationSettings,
    reading: Reading,
    context: Context,
    meter: ClassificationMeter | None = None,
) -> tuple[dict[str, float], float]:
    """Evaluates a network on images, each once over all ranks, and shows how far it is.

    Args:
        reading: from `place`.
        meter: see `engine.evaluate`.

    Returns:
        The figures of `utils.classification.engine.evaluate` and, where the data has labels anew,
        of their meter; and the seconds that it took.
    """
    images = data.as_read()
    batches = validation_batches(images, recipe, reading, context.rank, context.world_size)
    autocast = partial(backends.autocast, context.device, "off" if settings.fast else settings.amp)
    began = time.perf_counter()
    length = (len(images), recipe.batch_size, settings.print_freq)
    shown = watched(batches(), evaluation_progress(*length, context))
    spread = distributed.data_parallel(data.compared(network, context.device), context)
    real = data.meter(context.device)
    figures = engine.evaluate(spread, shown, context.device, autocast, meter=meter, real=real)
    assert figures is not None  # nothing asks it to stop
    seconds = time.perf_counter() - began
    if real is not None:
        figures |= real.figures()
    if data.outputs is not None:
        figures["compared_classes"] = len(data.outputs)
    return figures, seconds


def begin_state(
    network: Network,
    settings: ClassificationSettings,
    recipe: Recipe,
    saved: Checkpoint | None,
    context: Context,
) -> RunState:
    """Makes all that changes in training, as it was saved where a run goes on."""
    fp16 = settings.amp == "fp16"
    scales = None if recipe.layer_decay == 1 else models.layer_scales(network, recipe.layer_decay)
    state = first_state(
        network, recipe, context.device, context.rank, fp16, settings.compile, scales
    )
    if saved is not None:
        state.restore(saved.contents)
    if settings.start_epoch is not None:
        state.begin(settings.start_epoch)
    return state


def make_record(
    network: Network,
    settings: ClassificationSettings,
    recipe: Recipe,
    seed: int,
    data: TrainingData,
    start: Start,
) -> dict[str, Any]:
    """Returns what every checkpoint of a run holds besides the state, but for the environment."""
    return {
        **weights.describe_network(network),
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": list(data.train.classes),
        "img_size": recipe.img_size,
        "crop_pct": recipe.crop_pct,
        "recipe": recipe.as_dict(),
        "args": dict(settings.saved_flags),
        "seed": seed,
        "train_digest": data.digest,
        "class_weights": None if data.class_weights is None else list(data.class_weights),
        "pretrained": settings.pretrained if start.run is None else start.run.pretrained,
        "train_images": len(data.train),
    }

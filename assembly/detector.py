"""Builds a detector for detect_main.py, with first or saved weights, and reports on it."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from models.detection.detectors import (
    FIRST_LABEL,
    LOSSES,
    describe_detector,
    detector_from_checkpoint,
)
from models.detection.start import refuse_another_network, start_detector, start_from_detector
from utils.data.loading import Reading
from utils.detection import report
from utils.detection.coco_evaluation import write_results
from utils.detection.coco_files import Place, locate
from utils.detection.state import first_state
from utils.detection.task import Evaluation, Summaries
from utils.detection.training_data import DetectionData
from utils.options.settings import DetectionSettings
from utils.recipes.detection import DetectionRecipe
from utils.runs import folder as runs
from utils.runs import resume
from utils.runs.resume import Start
from utils.runs.saved_run import Checkpoint
from utils.system import backends
from utils.system.distributed import Context
from utils.system.errors import UserError, as_user_error
from utils.training.device_report import device_lines
from utils.training.state import RunState


def build_network(
    settings: DetectionSettings,
    recipe: DetectionRecipe,
    start: Start,
    classes: list[str],
    context: Context,
) -> tuple[nn.Module, list[str]]:
    """Makes the detector that is trained, with its first or saved weights, and lines about it.

    Raises:
        UserError: flags, classes and weights do not fit together, or not the device.
    """
    with as_user_error():
        network, notes = _with_weights(settings, recipe, start, classes)
    norm = describe_detector(network)["model_kwargs"]["norm"]
    if norm == "sync" and context.device.type != "cuda":
        raise UserError("--norm sync runs on CUDA alone: give --norm bn")
    return network, [report.network_line(network), *notes]


def _with_weights(
    settings: DetectionSettings, recipe: DetectionRecipe, start: Start, classes: list[str]
) -> tuple[nn.Module, list[str]]:
    sizes: dict[str, Any] = {"min_size": recipe.min_size, "max_size": recipe.max_size}
    outputs = len(classes) + FIRST_LABEL[recipe.arch]
    first = start.pretrained
    if start.saved is not None:
        return detector_from_checkpoint(start.saved.contents, **sizes), []
    trained: dict[str, Any] = {"norm": settings.norm, "trainable_layers": settings.trainable_layers}
    if settings.detector_weights and first is not None:
        with as_user_error(f"{first.file}: "):
            network, note = start_from_detector(
                first.contents, outputs, classes, **trained, **sizes, **recipe.settings
            )
        return network, [note]
    network, note = start_detector(
        recipe.arch,
        recipe.backbone,
        settings.ksize,
        outputs,
        None if first is None else first.contents,
        **trained,
        legacy=settings.legacy,
        **sizes,
        **recipe.settings,
    )
    return network, [note]


def read_first_weights(asked: Namespace, network_flags: Mapping[str, Any]) -> Checkpoint | None:
    """Reads the file that --backbone-weights or --detector-weights names, if one does.

    Args:
        asked: the flags.
        network_flags: those that say which detector is wanted.

    Raises:
        UserError: the file holds another detector than the flags ask for.
    """
    file = asked.backbone_weights or asked.detector_weights
    if not file:
        return None
    first = Checkpoint.read(Path(file))
    if asked.detector_weights:
        if not first.is_detector:
            raise UserError(f"{file}: no detector's checkpoint; give one of detect_main.py")
        # How its layers train is this run's own choice.
        wanted = {**network_flags, "norm": None, "trainable_layers": None}
        with as_user_error(f"{file} "):
            refuse_another_network(first.contents, wanted)
    return first


def place_of(part: str, settings: DetectionSettings, root: str | Path) -> Place:
    """Returns where the images and annotations of "train" or "val" are, below the data folder."""
    names = (settings.val_images, settings.val_annotations)
    if part == "train":
        names = (settings.train_images, settings.train_annotations)
    return locate(root, part, *names, settings.images_anywhere)


def is_channels_last(settings: DetectionSettings, context: Context) -> bool:
    """Returns whether the layout is NHWC: as asked for, or on the CPU, where NCHW is far slower."""
    asked = settings.channels_last
    return context.device.type == "cpu" if asked is None else asked


def how_it_runs(network: nn.Module, settings: DetectionSettings, context: Context) -> list[str]:
    """Says on which device a detector runs, in which precision, and how the ends of blocks do."""
    dtype = backends.DTYPES[settings.amp]
    tails = models.describe_tails(network, context.device, settings.fused, dtype)
    last = is_channels_last(settings, context)
    return device_lines(context, settings.amp, last, compiled=False, tails=tails)


def place(network: nn.Module, settings: DetectionSettings, context: Context) -> Reading:
    """Puts the network on its device in its layout, and says how its batches are to be read."""
    last = is_channels_last(settings, context)
    layout = torch.channels_last if last else torch.contiguous_format
    network.to(context.device).to(memory_format=layout)
    models.set_fused(network, settings.fused)
    return Reading(context.device, settings.workers, settings.worker_timeout)


def begin_state(
    network: nn.Module,
    settings: DetectionSettings,
    recipe: DetectionRecipe,
    saved: Checkpoint | None,
    context: Context,
) -> RunState:
    """Makes all that changes in training, as it was saved where a run goes on.

    Args:
        recipe: with a number for its learning rate.
    """
    losses, fp16 = LOSSES[recipe.arch], settings.amp == "fp16"
    state = first_state(network, recipe, losses, context.device, context.rank, fp16)
    if saved is not None:
        state.restore(saved.contents)
    return state


def make_record(
    network: nn.Module,
    settings: DetectionSettings,
    recipe: DetectionRecipe,
    seed: int,
    data: DetectionData,
) -> dict[str, Any]:
    """Returns what every checkpoint of a run holds besides the state, but for the environment.

    Args:
        recipe: as given, with lr "auto", so that a resumption may have another batch.
    """
    return {
        **describe_detector(network),
        "classes": data.train.classes,
        "category_ids": data.train.category_ids,
        "recipe": recipe.as_dict(),
        "args": dict(settings.saved_flags),
        "seed": seed,
        "train_digest": data.digest,
        "train_images": len(data.train),
    }


def write_evaluation(
    settings: DetectionSettings, evaluation: Evaluation, summaries: Summaries, context: Context
) -> None:
    """Writes the files that were asked for with -e."""
    results, val = evaluation.results, evaluation.val
    if settings.results_json:
        write_results(Path(settings.results_json), list(results))
        print(f"{len(results):,} detections written to {settings.results_json}")
    if settings.picture:
        report.write_picture(Path(settings.picture), val.place, val.masks, results)
        print(f"picture written to {settings.picture}")
    if settings.output and settings.resume != resume.AUTO:
        figures = {kind: vars(summary) for kind, summary in summaries.items()}
        inputs = {"checkpoint": settings.source, "data": settings.data, "images": len(val.split)}
        written = runs.write_evaluation(settings.output, {**figures, **inputs}, context)
        print(f"written to {written}")

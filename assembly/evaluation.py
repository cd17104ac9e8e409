"""Evaluates a classifier for main.py, and writes figures and report of the evaluation."""

import os
import time
from functools import partial
from pathlib import Path

from torch import nn

from assembly import classifier
from assembly.evaluation_report import write_report
from utils.classification import engine, report
from utils.classification.evaluation_data import EvaluationData
from utils.classification.image_outcomes import OutcomeMeter
from utils.classification.task import TaskBatches
from utils.data.image_folder import ImageFolder
from utils.data.loading import Reading, validation_order
from utils.options.settings import ClassificationSettings
from utils.recipes.classification import Recipe
from utils.runs import checkpoint, resume
from utils.runs import folder as runs
from utils.runs.commands import command
from utils.runs.resume import Start
from utils.runs.saved_run import Checkpoint
from utils.runs.writer import RunFiles
from utils.system import distributed
from utils.system.backends import AutocastFactory
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.stop_requests import StopRequest
from utils.training.progress import evaluation_progress, watched
from utils.training.state import RunState


def judge_and_write(
    network: nn.Module,
    data: EvaluationData,
    recipe: Recipe,
    settings: ClassificationSettings,
    reading: Reading,
    saved: Checkpoint,
    context: Context,
) -> None:
    """Evaluates a checkpoint, says its figures, and writes them, and a report, where asked.

    Args:
        network: on its device, see `classifier.place`.
        saved: what it was made from.
    """
    reports = bool(settings.typed["report"])  # a run that ends with one does not ask for one here
    own_folder = settings.resume == resume.AUTO or settings.output is None
    place = None
    if reports:
        place = _own_report_place(saved.file.parent) if own_folder else Path(settings.output or "")
    meter = OutcomeMeter(context.device) if reports else None
    judged = classifier.judge(network, data, recipe, settings, reading, context, meter)
    figures, seconds = judged
    context.say(*report.evaluation_lines(figures, seconds))
    told = {**figures, "checkpoint": settings.source, "data": settings.data}
    if settings.output and settings.resume != resume.AUTO and context.is_main:
        print(f"written to {runs.write_evaluation(settings.output, told, context)}")
    if meter is not None:
        told["checkpoint"] = str(saved.file)
        _report(meter, data.images, recipe, told, place, context)


def report_run(
    state: RunState,
    files: RunFiles,
    images: ImageFolder,
    batches: TaskBatches,
    recipe: Recipe,
    settings: ClassificationSettings,
    autocast: AutocastFactory,
    context: Context,
    stop: StopRequest,
) -> int:
    """Evaluates the best checkpoint of a run that has ended once more, and writes its report.

    Call it on every rank, after the last save: the network gets that checkpoint's weights. Where no
    epoch is the best, because no loss was finite, it is the last one.

    Args:
        images: of the validation.

    Returns:
        The exit code: 0, or that of `stop`.
    """
    source = ""
    if files.folder is not None:
        place = files.checkpoints.last if files.lacks_best() else files.checkpoints.best
        source = str(place)
        state.evaluated.load_state_dict(Checkpoint.read(place).contents["state_dict"])
    distributed.broadcast_state(state.evaluated)
    meter = OutcomeMeter(context.device)
    length = (batches.val_images, recipe.batch_size, settings.print_freq)
    shown = watched(batches.val(), evaluation_progress(*length, context, "report"))
    network = distributed.data_parallel(state.evaluated, context)
    began = time.perf_counter()
    asked = partial(_asked_to_stop, stop, context)
    figures = engine.evaluate(network, shown, context.device, autocast, asked, meter)
    if figures is None:
        context.say("asked to stop: the run is saved, and its report is not written; for one:")
        context.say(f"  {command('-e', '--resume', source, settings.data, '--report')}")
        return stop.exit_code
    context.say(f"report of {source}")
    context.say(*report.evaluation_lines(figures, time.perf_counter() - began))
    told = {**figures, "checkpoint": source, "data": settings.data}
    _report(meter, images, recipe, told, files.folder, context)
    return 0


def how_to_report(settings: ClassificationSettings, start: Start) -> list[str]:
    """Returns a line on the report of a run that had ended before this start."""
    if not settings.report or start.saved is None:
        return []
    best = start.saved.file.with_name(checkpoint.BEST)
    source = best if best.exists() else start.saved.file
    return [f"  report: {command('-e', '--resume', source, settings.data, '--report')}"]


def _asked_to_stop(stop: StopRequest, context: Context) -> bool:
    return context.is_main and bool(stop)


def _own_report_place(folder: Path) -> Path | None:
    """Returns the folder of the checkpoint's run, None where the checkpoint is in no run's folder.

    Raises:
        UserError: no report can be written there; said before the evaluation.
    """
    if not (folder / runs.LOCK).exists():  # somebody else's folder, and nobody's to write to
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: cannot write a report there (no permission); give --output DIR", EXIT_FAILED
        )
    return folder


def _report(
    meter: OutcomeMeter,
    images: ImageFolder,
    recipe: Recipe,
    told: dict[str, object],
    folder: Path | None,
    context: Context,
) -> None:
    """Gathers the outcomes of all ranks; rank 0 writes them below `folder`, or a new one in runs/.

    Call it on every rank.
    """
    order = validation_order(len(images), recipe.batch_size, context.rank, context.world_size)
    outcomes = meter.outcomes([key[1] for keys in order for key in keys], len(images))
    if not context.is_main:
        return
    if folder is None:
        folder = runs.create(runs.run_name(recipe.arch, "report"))
    told |= runs.environment(context)
    written = write_report(folder, outcomes, images, recipe.arch, told)
    print(f"report written to {written}: {', '.join(sorted(p.name for p in written.iterdir()))}")

"""Evaluates a classifier, and writes the figures and the report of the evaluation."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from utils.config.classification import Config
from utils.data.image_folder import ImageFolder
from utils.data.loader import Batch
from utils.inspection.report import ReportMeter, own_report_folder, report_lines, write_report
from utils.runs import checkpoint
from utils.runs import folder as runs
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import AUTO, Start
from utils.runs.writer import RunFiles, command
from utils.system import backends, distributed
from utils.system.distributed import Context
from utils.system.signals import StopRequest
from utils.training import classification, classifier
from utils.training.classification import ClassificationMeter
from utils.training.classification_data import EvaluationData, validation_batches, validation_order
from utils.training.progress import evaluation_progress, watched
from utils.training.state import TrainingState


def evaluate_and_write(
    network: nn.Module, data: EvaluationData, config: Config, saved: Checkpoint, context: Context
) -> None:
    """Evaluates a checkpoint, says its figures, and writes them, and a report, where asked for.

    Args:
        network: on its device, see `classifier.to_device`; its `arch` is the report's title.
    """
    run = config.run
    reports = bool(config.typed.get("report"))  # a run that ends with one asks for none here
    own_folder = run.resume == AUTO or run.output is None
    folder = None
    if reports:
        folder = own_report_folder(saved.file.parent) if own_folder else Path(run.output or "")
    kind = ReportMeter if reports else ClassificationMeter
    meter = kind(context.device, len(data.images.classes))
    figures, seconds = evaluate_shown(network, data, config, context, meter)
    context.say(*classification.evaluation_lines(figures, seconds, meter.classes))
    source = str(run.resume or config.network.pretrained)
    record: dict[str, Any] = {**figures, "checkpoint": source, "data": config.data.data}
    if run.output and run.resume != AUTO and context.is_main:
        print(f"written to {runs.write_evaluation(run.output, record, context)}")
    if isinstance(meter, ReportMeter):
        record["checkpoint"] = str(saved.file)
        _report(meter, data.images, config, str(network.arch), record, folder, context)


def evaluate_shown(
    network: nn.Module,
    data: EvaluationData,
    config: Config,
    context: Context,
    meter: ClassificationMeter,
) -> tuple[dict[str, float], float]:
    """Evaluates a network on images, each once over all ranks, and shows how far it is.

    Returns:
        The figures of `classification.evaluate` and, where the data has labels anew, of their
        meter; and the seconds that it took.
    """
    recipe, images = config.recipe, data.as_read()
    loader = classifier.loader_of(config.data, config.network, context)
    batches = validation_batches(images, recipe, loader, context.rank, context.world_size)
    amp = "off" if config.network.fast else config.network.amp
    autocast = partial(backends.autocast, context.device, amp)
    began = time.perf_counter()
    progress = evaluation_progress(len(images), recipe.batch_size, config.run.print_freq, context)
    spread = distributed.data_parallel(data.compared(network, context.device), context)
    real = data.meter(context.device)
    figures = classification.evaluate(
        spread, watched(batches(), progress), meter, autocast, real=real
    )
    assert figures is not None  # nothing asks it to stop
    seconds = time.perf_counter() - began
    if real is not None:
        figures |= real.figures()
    if data.outputs is not None:
        figures["compared_classes"] = len(data.outputs)
    return figures, seconds


def report_run(
    state: TrainingState,
    run: RunFiles,
    images: ImageFolder,
    batches: Callable[[], Iterable[Batch]],
    config: Config,
    context: Context,
    stop: StopRequest,
) -> int:
    """Evaluates the best checkpoint of a run that has ended, or the last, and writes its report.

    Call it on every rank, after the last save: the network gets that checkpoint's weights. Images
    and batches are those of the validation. Returns the exit code: 0, or that of `stop`.
    """
    source = ""
    if run.folder is not None:
        file = run.checkpoints.last if run.lacks_best() else run.checkpoints.best
        source = str(file)
        state.evaluated.load_state_dict(Checkpoint.read(file).state_dict)
    distributed.broadcast_state(state.evaluated)
    meter = ReportMeter(context.device, state.meter.classes)
    progress = evaluation_progress(
        len(images), config.recipe.batch_size, config.run.print_freq, context, "report"
    )
    began = time.perf_counter()
    figures = classification.evaluate(
        distributed.data_parallel(state.evaluated, context),
        watched(batches(), progress),
        meter,
        partial(backends.autocast, context.device, config.network.amp),
        partial(stop.on_main, context.is_main),
    )
    if figures is None:
        context.say("asked to stop: the run is saved, and its report is not written; for one:")
        context.say(f"  {command('-e', '--resume', source, config.data.data, '--report')}")
        return stop.exit_code
    context.say(f"report of {source}")
    seconds = time.perf_counter() - began
    context.say(*classification.evaluation_lines(figures, seconds, meter.classes))
    record = {**figures, "checkpoint": source, "data": config.data.data}
    _report(meter, images, config, config.recipe.arch, record, run.folder, context)
    return 0


def how_to_report(config: Config, start: Start) -> list[str]:
    """Returns a line on the report of a run that had ended before this start."""
    if not config.run.report or start.saved is None:
        return []
    best = start.saved.file.with_name(checkpoint.BEST)
    source = best if best.exists() else start.saved.file
    return [f"  report: {command('-e', '--resume', source, config.data.data, '--report')}"]


def _report(
    meter: ReportMeter,
    images: ImageFolder,
    config: Config,
    arch: str,
    record: dict[str, Any],
    folder: Path | None,
    context: Context,
) -> None:
    """Gathers predictions, on every rank; rank 0 writes them below `folder`, or anew in runs/."""
    batch = config.recipe.batch_size
    order = validation_order(len(images), batch, context.rank, context.world_size)
    evaluated = meter.gathered([key[1] for keys in order for key in keys], len(images))
    if not context.is_main:
        return
    if folder is None:
        folder = runs.create(runs.run_name(arch, "report"))
    record |= runs.environment(context)
    print(*report_lines(write_report(folder, evaluated, images, arch, record)), sep="\n")

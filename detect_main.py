"""Trains and evaluates Faster R-CNN, Mask R-CNN and RetinaNet with ECA backbones on COCO data.

examples:
  detect_main.py -a mask_rcnn -b eca_resnet50 --ksize 3557 --backbone-weights CKPT DATA
  torchrun --nproc-per-node=8 detect_main.py … DATA    one process per GPU
  detect_main.py -e --resume CKPT DATA                 evaluate: COCO's twelve figures
  detect_main.py --resume auto                         go on with the newest run
  detect_main.py demo:shapes                           real images without a download
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.detection.detectors import FIRST_LABEL
from utils.command_line.detection import notes_on, read_command_line
from utils.config.detection import DetectionConfig, DetectionRecipe
from utils.data import demo_shapes
from utils.data.coco_dataset import CocoDataset
from utils.data.coco_eval import Result, write_results
from utils.data.loader import check_readable, end_workers
from utils.inspection import report
from utils.inspection.drawing import draw_first_batch, draw_predictions
from utils.runs import folder as runs
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import Start
from utils.runs.writer import RunFiles
from utils.system import backends, distributed
from utils.system.distributed import Context, Votes
from utils.system.faults import run_script
from utils.system.files import check_new_file, write_atomically
from utils.system.signals import StopRequest
from utils.system.text import all_epochs, counted, printable_lines
from utils.training import detection, detector
from utils.training.detection import IMAGES, Summaries, evaluate, train_one_epoch
from utils.training.detection_data import (
    DetectionBatch,
    DetectionData,
    GroupedBatches,
    ValidationSet,
    evaluation_batches,
    open_detection_data,
    paths_of,
    training_batches,
)
from utils.training.optim import StepRule
from utils.training.progress import Pace, epoch_progress, evaluation_progress, fitted, watched
from utils.training.state import TrainingState

RECIPE = DetectionRecipe()  # the paper's, for COCO
SMALLER = "a smaller --batch-size or --min-size, or --amp bf16"  # what spares memory


def main() -> int:
    """Does one run from the command line."""
    config, start = read_command_line(RECIPE, __doc__)
    context = distributed.setup(config.network.device, config.network.gpu)
    context = distributed.on_one_gpu(context)
    try:
        if config.run.evaluate:
            return evaluate_checkpoint(config, start.saved, context)
        with StopRequest() as stop:
            return train(config, start, replace(context, trains=True), stop)
    finally:
        end_workers()
        distributed.tear_down()


def train(config: DetectionConfig, start: Start, context: Context, stop: StopRequest) -> int:
    """Trains from the start, or on from a checkpoint, to the last epoch or until asked to stop."""
    recipe, flags, seed = config.recipe, config.network, start.seed(context)
    context.say(*backends.configure(config.run.seed is not None, context.device, False))
    # Data first: what a user can have wrong is said before anything heavy.
    data = open_detection_data(config.data, recipe, start, context)
    images, device = len(data.train), context.device
    context.say(*start.refuse_changes(recipe, images, data.digest, device, can_begin=False))
    torch.manual_seed(seed)
    network, lines = detector.build_network(recipe, flags, start, data.train.classes, context)
    lines += [detector.recipe_line(recipe), *notes_on(recipe, data.train.sizes)]
    context.say(*data.lines, *lines, *start.notes)
    state = detector.begin_state(network, recipe, flags, start, context)
    if state.epoch >= recipe.epochs:  # no fault: a scheduler may start a finished run once more
        context.say(f"{all_epochs(recipe.epochs)} done: give more with --epochs")
        return 0

    loader, first_label = detector.loader_of(config.data, context), FIRST_LABEL[recipe.arch]
    rank, ranks, results = context.rank, context.world_size, []
    order = GroupedBatches(data.train.sizes, recipe.batch_size, seed, rank, ranks)
    train_pass = training_batches(data.train, order, first_label, recipe, seed, loader)
    val_pass = evaluation_batches(data.val.split, first_label, loader, rank, ranks)
    if config.data.check_val:
        check_readable(CocoDataset(data.val.split, first_label), context)
    rule = StepRule.of(recipe, order.steps, seed, flags.amp, context)
    record = detector.record_of(network, config, seed, data)
    name = f"{recipe.arch}_{recipe.backbone}"
    run = RunFiles.open(name, config.run, start, record, state, context)
    run.draw("batch.png", partial(draw_first_batch, data.train, order, recipe.hflip))
    wrapped, every = distributed.wrap(network, context), config.run.print_freq
    votes, pace = Votes(context.votes), Pace()

    while state.epoch < recipe.epochs:
        lr = rule.lr_at((state.epoch + 1) * order.steps - 1)  # of the epoch's last step
        progress = epoch_progress(state, recipe, order.steps, every, pace, context, decimals=1)
        order.seek(state.epoch, state.step)
        done = train_one_epoch(state, wrapped, train_pass(), rule, progress, run, votes, stop)
        speed, ended = progress.close(), time.perf_counter()
        if not done:
            distributed.gather(0)  # torchrun ends the others as soon as one has ended
            return run.stopped(state.epoch, state.step, stop.exit_code)
        state.share_buffers()
        run.save(state.snapshot())  # whatever evaluation meets with, the epoch is not lost

        evaluated = evaluate_epoch(state, val_pass, data.val, config, context, stop)
        if evaluated is None:
            return run.stopped(state.epoch, state.step, stop.exit_code)
        results, summaries = evaluated
        row = state.row(lr, detection.validation_columns(summaries))
        improved = detection.is_better(row, state.best)
        state.finish_epoch(row, improved, detection.best_details(summaries))
        run.finish_epoch(state.snapshot(), detection.panels(state.history), speed, improved)
        pace.note_between(time.perf_counter() - ended)
        context.say(*fitted(detection.epoch_line(row, recipe.epochs, speed, improved)))

    say_farewell(state, run, data, results, config)
    return 0


def evaluate_epoch(
    state: TrainingState,
    val_pass: Callable[[], Iterable[DetectionBatch]],
    val: ValidationSet,
    config: DetectionConfig,
    context: Context,
    stop: StopRequest,
) -> tuple[Sequence[Result], Summaries] | None:
    """Evaluates at an epoch's end: nothing where that is not due, None when asked to stop."""
    recipe, run, epoch = config.recipe, config.run, state.epoch + 1
    if epoch % run.eval_every and epoch < recipe.epochs:
        return (), {}
    title, every = f"epoch {epoch}/{recipe.epochs} val", IMAGES * run.print_freq
    progress = evaluation_progress(len(val.split), context.world_size, every, context, title)
    autocast = partial(backends.autocast, context.device, config.network.amp)
    batches, ends = watched(val_pass(), progress), partial(stop.on_main, context.is_main)
    first_label = FIRST_LABEL[recipe.arch]
    return evaluate(state.network, batches, val, first_label, autocast, context, ends)


def say_farewell(
    state: TrainingState,
    run: RunFiles,
    data: DetectionData,
    results: Sequence[Result],
    config: DetectionConfig,
) -> None:
    """Closes a run, and says what came of it and what a user wants next. Call on every rank."""
    picture, val = "predictions.png", data.val
    run.draw(picture, partial(draw_predictions, val.paths, val.masks, results))
    run.close()
    if run.folder is None:  # not the main process
        return
    words, more = detection.best_words(state.best), ("--epochs", 2 * config.recipe.epochs)
    lines = detection.best_lines(state.best)
    lines += run.farewell(words, bool(state.best), str(config.data.data), *more)
    if (run.folder / picture).exists():
        lines.append(f"  last epoch's detections beside the ground truth: {run.folder / picture}")
    print(*map(printable_lines, lines), sep="\n", flush=True)


def evaluate_checkpoint(config: DetectionConfig, saved: Checkpoint, context: Context) -> int:
    """Evaluates a checkpoint on the validation images, each once."""
    backends.configure(False, context.device, one_shape=False)
    check_new_file(config.run.results_json)
    check_new_file(config.run.picture)
    if config.run.report and config.run.output is None:
        report.own_report_folder(saved.file.parent)  # refused before the evaluation
    sizes = {name: config.typed[name] for name in ("min_size", "max_size") if name in config.typed}
    network = saved.detector(**sizes)
    paths = paths_of("val", config.data, demo_shapes.find_root(str(config.data.data), context))
    masks = network.arch == "mask_rcnn"
    val = ValidationSet(paths, masks, list(saved.classes or ()), str(saved.file))
    distributed.refuse_differences(validation_images=len(val.split))
    context.say(
        *val.lines,
        detector.network_line(network),
        *detector.how_it_runs(network, config.network, context),
    )
    detector.to_device(network, config.network, context)
    first_label, ranks = FIRST_LABEL[network.arch], context.world_size
    loader = detector.loader_of(config.data, context)
    batches = evaluation_batches(val.split, first_label, loader, context.rank, ranks)()
    progress = evaluation_progress(len(val.split), ranks, IMAGES * config.run.print_freq, context)
    autocast = partial(backends.autocast, context.device, config.network.amp)
    began = time.perf_counter()
    evaluated = evaluate(network, watched(batches, progress), val, first_label, autocast, context)
    assert evaluated is not None  # nothing asks it to stop
    results, summaries = evaluated
    speed = len(val.split) / (time.perf_counter() - began)
    context.say(
        *detection.summary_lines(summaries),
        f"{counted(len(val.split), 'image', ',')}, {speed:,.1f} images/s",
    )
    if context.is_main:
        write_evaluation(config, saved, val, results, summaries, context)
    return 0


def write_evaluation(
    config: DetectionConfig,
    saved: Checkpoint,
    val: ValidationSet,
    results: Sequence[Result],
    summaries: Summaries,
    context: Context,
) -> None:
    """Writes the files that were asked for with -e."""
    run = config.run
    if run.results_json:
        write_results(Path(run.results_json), list(results))
        print(f"{counted(len(results), 'detection', ',')} written to {run.results_json}")
    if run.picture:
        write_atomically(Path(run.picture), draw_predictions(val.paths, val.masks, results))
        print(f"picture written to {run.picture}")
    inputs = {"checkpoint": run.resume, "data": config.data.data, "images": len(val.split)}
    output = None if run.resume == "auto" else run.output
    if output:
        figures: dict[str, Any] = {kind: vars(summary) for kind, summary in summaries.items()}
        print(f"written to {runs.write_evaluation(output, {**figures, **inputs}, context)}")
    if run.report:
        record = {**detection.validation_columns(summaries), **inputs}
        print(*report.report_detector(saved, val, results, record, output, context), sep="\n")


if __name__ == "__main__":
    run_script(main, SMALLER)

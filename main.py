"""Trains and evaluates ECA-ResNets, and what they are compared with, on a folder of class folders.

examples:
  main.py -a eca_resnet50 --ksize 3557 DATA       all visible GPUs, one GPU, or the CPU
  torchrun --nproc-per-node=2 main.py … DATA      one process per GPU, faster
  main.py -e --resume CKPT DATA                   evaluate, also a file of export.py (best.onnx)
  main.py --recipe modern DATA                    600 epochs for what the network can do
  main.py --resume auto                           go on with the newest run
  main.py demo:digits                             real images without a download
  main.py demo:fashion --download                 70,000 photographs of garments
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import models
from utils.command_line.classification import ExportedFile, read_command_line
from utils.config.classification import Config, Recipe
from utils.data import demo_sets
from utils.data.loader import Batch, ImageDataset, check_readable, end_workers
from utils.inspection import evaluation
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import Start
from utils.runs.writer import RunFiles
from utils.system import backends, distributed
from utils.system.distributed import Context, Votes
from utils.system.errors import as_user_error
from utils.system.faults import run_script
from utils.system.signals import StopRequest
from utils.training import classification, classifier
from utils.training.classification import RecallMeter, draw_first_batch, train_one_epoch
from utils.training.classification_data import (
    TrainingData,
    open_evaluation_data,
    open_training_data,
    replaced_lines,
    training_batches,
    validation_batches,
)
from utils.training.optim import StepRule
from utils.training.progress import Pace, epoch_progress, evaluation_progress, fitted, watched
from utils.training.state import TrainingState

RECIPE = Recipe(  # the paper's, for ResNets
    arch="eca_resnet50",
    epochs=100,
    batch_size=256,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="step",
    lr_step=30,
    lr_decay=0.1,
)
SMALLER = "a smaller -b or --img-size, or --amp bf16"  # what spares memory
DEMOS = demo_sets.recipes("eca_resnet18")


def main(
    recipe: Recipe = RECIPE,
    demos: Mapping[str, Mapping[str, object]] = DEMOS,
    description: str = __doc__,
) -> int:
    """Does one run from the command line.

    Args:
        recipe: the script's default, the paper's.
        demos: what each demo needs otherwise, whatever the --recipe.
        description: of the script, for its help.
    """
    config, start = read_command_line(recipe, demos, description)
    context = distributed.setup(config.network.device, config.network.gpu)
    try:
        if config.network.compile:
            distributed.refuse_compile(context)
        if config.run.evaluate:
            return evaluate_checkpoint(config, start.saved, context)
        with StopRequest() as stop:
            return train(config, start, replace(context, trains=True), stop)
    finally:
        end_workers()
        distributed.tear_down()


def train(config: Config, start: Start, context: Context, stop: StopRequest) -> int:
    """Trains from the start, or on from a checkpoint, to the last epoch or until asked to stop."""
    recipe, flags, seed = config.recipe, config.network, start.seed(context)
    context.say(*backends.configure(config.run.seed is not None, context.device))
    # Data first: what a user can have wrong is said before anything heavy.
    weights, device = config.typed.get("class_weights"), context.device
    data = open_training_data(config.data, recipe, weights, start, context)
    context.say(*start.refuse_changes(recipe, len(data.train), data.digest, device))
    torch.manual_seed(seed)
    network, config, lines = classifier.build_network(config, start, data.classes, context)
    lines += classifier.recipe_lines(recipe, config.run.recipe, flags.grad_checkpointing)
    context.say(*data.lines(), *lines, *start.notes)
    state = classifier.begin_state(network, recipe, flags, start, context)
    if reason := classification.why_ended(state, recipe):
        context.say(reason, *evaluation.how_to_report(config, start))
        return 0

    loader, skip = classifier.loader_of(config.data, flags, context), config.data.skip_bad_images
    order, decoder = data.order(recipe, seed, context), loader.decoder
    train_pass = training_batches(data.train, order, recipe, seed, loader, skip)
    val_pass = validation_batches(data.val, recipe, loader, context.rank, context.world_size)
    if config.data.check_val:
        check_readable(ImageDataset(data.val, recipe.preprocessing, decoder=decoder), context)
    rule = StepRule.of(recipe, order.steps, seed, flags.amp, context)
    aim = classification.Objective.of(recipe, network.num_classes, data.class_weights, device)
    record = classifier.record_of(network, config, seed, data, start)
    run = RunFiles.open(recipe.arch, config.run, start, record, state, context)
    run.draw("batch.png", partial(draw_first_batch, data, order, rule, aim, loader, skip))
    wrapped = distributed.wrap(network, context, recipe.sync_bn)
    evaluated = distributed.data_parallel(state.evaluated, context)
    votes, pace, every = Votes(context.votes), Pace(), config.run.print_freq

    while classification.why_ended(state, recipe) is None:
        lr = rule.lr_at(state.epoch * order.steps)  # of the epoch's first step
        progress = epoch_progress(state, recipe, order.steps, every, pace, context)
        order.seek(state.epoch, state.step)
        batches = train_pass()
        done = train_one_epoch(state, wrapped, batches, rule, aim, progress, run, votes, stop)
        speed, ended = progress.close(), time.perf_counter()
        if not done:
            distributed.gather(0)  # torchrun ends the others as soon as one has ended
            return run.stopped(state.epoch, state.step, stop.exit_code)
        state.share_buffers()
        run.save(state.snapshot())  # whatever evaluation meets with, the epoch is not lost

        figures = evaluate_epoch(state, evaluated, val_pass, len(data.val), config, context, stop)
        if figures is None:
            return run.stopped(state.epoch, state.step, stop.exit_code)
        row = state.row(lr, classification.validation_columns(figures))
        improved = classification.is_better(row, state.best, recipe.best_by)
        state.finish_epoch(row, improved)
        run.finish_epoch(state.snapshot(), classification.panels(), speed, improved)
        pace.note_between(time.perf_counter() - ended)
        line = classification.epoch_line(row, recipe.epochs, speed, improved, state.meter.classes)
        context.say(*fitted(line))

    say_farewell(state, run, data, config, context)
    if config.run.report:
        return evaluation.report_run(state, run, data.val, val_pass, config, context, stop)
    return 0


def evaluate_epoch(
    state: TrainingState,
    network: nn.Module,
    val_pass: Callable[[], Iterable[Batch]],
    images: int,
    config: Config,
    context: Context,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Evaluates a network at an epoch's end: {} where that is not due, None when asked to stop.

    Args:
        images: of the validation, over all ranks.
    """
    recipe, run, epoch = config.recipe, config.run, state.epoch + 1
    if epoch % run.eval_every and epoch < recipe.epochs:
        return {}
    title = f"epoch {epoch}/{recipe.epochs} val"
    progress = evaluation_progress(images, recipe.batch_size, run.print_freq, context, title)
    kind = RecallMeter if recipe.best_by == classification.RECALL else type(state.meter)
    meter = kind(context.device, state.meter.classes)
    autocast = partial(backends.autocast, context.device, config.network.amp)
    ends = partial(stop.on_main, context.is_main)
    return classification.evaluate(network, watched(val_pass(), progress), meter, autocast, ends)


def say_farewell(
    state: TrainingState, run: RunFiles, data: TrainingData, config: Config, context: Context
) -> None:
    """Closes a run, and says what came of it and what a user wants next. Call on every rank."""
    loader = classifier.loader_of(config.data, config.network, context)
    amp, network = config.network.amp, state.evaluated
    run.draw(
        "predictions.png",
        partial(classification.draw_predictions, network, data.val, config.recipe, amp, loader),
    )
    run.close()
    more = ["--epochs", 2 * config.recipe.epochs] if config.recipe.schedule != "cosine" else []
    if state.epoch < config.recipe.epochs:  # by --early-stop
        context.say(str(classification.why_ended(state, config.recipe)))
        more = ["--early-stop", 0]
    context.say(*replaced_lines(data.train, state.all_broken()))
    result = classification.best_words(state.best, config.recipe.best_by, state.meter.classes)
    context.say(*run.farewell(result, bool(state.best), str(config.data.data), *more))


def evaluate_checkpoint(config: Config, saved: Checkpoint, context: Context) -> int:
    """Evaluates a checkpoint, or a file of export.py, on the validation images, each once."""
    flags = config.network
    backends.configure(False, context.device)
    if isinstance(saved, ExportedFile):
        network, lines = saved.engine, [saved.engine.describe(), *saved.how_it_runs(context)]
    else:
        network = saved.network(flags.attention)
        lines = [
            classifier.network_line(network),
            *classifier.how_it_runs(network, flags, context),
        ]
    data = open_evaluation_data(config.data, config.run, saved, network.num_classes, context)
    context.say(*data.lines(), *lines)
    classifier.to_device(network, flags, context)
    if flags.fast:
        dtype = backends.DTYPES[flags.amp]
        with as_user_error("--fast: "):
            network = models.optimise_for_inference(network, dtype, compile=flags.compile)
        context.say(f"  rebuilt for inference: BatchNorm folded, weights in {dtype}")
    evaluation.evaluate_and_write(network, data, config, saved, context)
    return 0


if __name__ == "__main__":
    run_script(main, SMALLER)

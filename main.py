"""Trains and evaluates ECA-ResNets, and what they are compared with, on a folder of class folders.

examples:
  main.py -a eca_resnet50 --ksize 3557 DATA       all visible GPUs, one GPU, or the CPU
  torchrun --nproc-per-node=2 main.py … DATA      one process per GPU, faster
  main.py -e --resume CKPT DATA                   evaluate
  main.py --recipe modern DATA                    600 epochs for what the network can do
  main.py --resume auto                           go on with the newest run
  main.py demo:digits                             real images without a download
  main.py demo:fashion --download                 70,000 photographs of garments
"""

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

import models
from models import start as start_weights
from models import weights
from utils.classification import engine, report
from utils.classification.outcome import CLASSIFICATION
from utils.classification.state import first_state
from utils.classification.task import TaskBatches, make_task
from utils.classification.training_data import TrainingData, make_record, open_training_data
from utils.data import demo_sets, splits
from utils.data.gpu_decoding import check_decoder, reading_of
from utils.data.loading import Reading, replaced_lines, validation_batches
from utils.options.classification import build_parser
from utils.options.common import NEVER_TAKEN, saved_recipe
from utils.options.parser import run_script
from utils.options.refusals import refuse_flags, refuse_no_work
from utils.options.settings import ClassificationSettings
from utils.recipes.classification import PAPER, RECIPES, Recipe
from utils.runs import checkpoint, resume
from utils.runs import folder as runs
from utils.runs.resume import Start
from utils.runs.writer import RunFiles, Saving
from utils.system import backends, distributed
from utils.system.distributed import Context
from utils.system.errors import UserError, as_user_error
from utils.system.fault_messages import Memory, in_one_line
from utils.system.processes import default_workers
from utils.system.stop_requests import StopRequest
from utils.training.device_report import device_lines
from utils.training.epochs import run_epochs
from utils.training.state import RunState

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
DEMOS = demo_sets.recipes("eca_resnet18")


def main(recipe: Recipe = RECIPE, demos: Mapping[str, Mapping[str, object]] = DEMOS) -> int:
    """One run from the command line.

    Args:
        recipe: the script's default, the paper's.
        demos: what each demo needs otherwise, whatever the --recipe.
    """
    settings, recipe, start = read_command_line(recipe, demos)
    smaller = "a smaller -b or --img-size, or --amp bf16"
    needs = Memory(f"-b {recipe.batch_size}", smaller, " or a smaller -b")
    context = distributed.setup(settings.device, settings.gpu)
    try:
        if settings.compile:
            distributed.refuse_compile(context)
        check_decoder(settings.decoder, context.device)
        if settings.evaluate:
            with in_one_line(needs):
                return evaluate(settings, recipe, start.saved, context)
        with StopRequest() as stop, in_one_line(needs, stop):
            return train(settings, recipe, start, context, stop)
    finally:
        distributed.tear_down()


def read_command_line(
    recipe: Recipe, demos: Mapping[str, Mapping[str, object]]
) -> tuple[ClassificationSettings, Recipe, Start]:
    """Parses the flags, finds the checkpoint, merges the recipe, and refuses what does not fit."""
    parser = build_parser(recipe, models.MODELS, __doc__.replace("main.py", Path(sys.argv[0]).name))
    args = typed = parser.parse_args()
    given = parser.given(vars(typed))
    recipe = recipe.override(**RECIPES[args.recipe or PAPER]).override(**demos.get(args.data, {}))
    of_any_run = args.data is None and args.arch is None and args.action is None
    name = None if of_any_run else runs.run_name(args.arch or recipe.arch, args.action)
    saved, folder = resume.read(
        args.resume, args.pretrained, name, args.output, args.evaluate, args.start_epoch
    )
    if saved is not None:
        source = str(args.resume or args.pretrained)
        asked = (args.arch, args.ksize, args.attention, args.num_classes)
        with as_user_error():
            start_weights.refuse_another(saved, source, *asked)
        if checkpoint.is_run(saved):
            parser.set_defaults(**parser.take_saved(saved["args"], NEVER_TAKEN, source))
            args = parser.parse_args()
            recipe = saved_recipe(parser, Recipe, saved["recipe"], source)
        else:
            recipe = recipe.override(**{k: saved.get(k) for k in ("img_size", "crop_pct")})
    recipe = recipe.override(**{k: v for k, v in vars(args).items() if k in recipe.as_dict()})
    refuse_flags(args, given, recipe)
    pretrained = None
    if saved is None:
        pretrained = args.pretrained and checkpoint.load(args.pretrained)
        with torch.device("meta"):  # costs nothing, and finds what does not fit
            first_network(args, recipe, pretrained)
    refuse_no_work(args, recipe)
    if args.workers is None:  # a demo's images are so small that processes would cost more
        args.workers = 0 if demo_sets.is_demo(args.data) else default_workers()
    args.channels_last |= args.fast  # how --fast rebuilds
    settings = ClassificationSettings.of(args, typed)
    return settings, recipe, Start(saved, pretrained, folder)


def evaluate(
    settings: ClassificationSettings, recipe: Recipe, saved: dict, context: Context
) -> int:
    """Evaluates a checkpoint on the validation images, each once."""
    backends.configure(False, context.device)
    source = settings.source
    classes = saved.get("classes")
    with as_user_error(f"{source}: "):
        network = weights.network_from_checkpoint(saved)
    root = demo_sets.find_root(settings.data, context, settings.data_files, settings.download)
    _, images = splits.open_split(root, classes, with_train=False)
    distributed.refuse_differences(validation_images=len(images))
    if classes is None and len(images.classes) != network.num_classes:
        raise UserError(
            f"{images.root} has {len(images.classes)} class folders, {source} "
            f"{network.num_classes} classes without names: the numbers must agree"
        )
    tails = "" if settings.fast else how_tails_run(network, settings, context)
    context.say(
        *report.data_lines(None, images),
        report.network_line(network),
        *device_lines(context, settings.amp, settings.channels_last, settings.compile, tails),
    )
    reading = place(network, settings, context, compiled=settings.compile and not settings.fast)
    amp = settings.amp
    if settings.fast:
        dtype, amp = backends.DTYPES[amp], "off"
        network = models.optimise_for_inference(network, dtype, compile=settings.compile)
        context.say(f"  rebuilt for inference: BatchNorm folded, weights in {dtype}")
    batches = validation_batches(images, recipe, reading, context.rank, context.world_size)
    autocast = partial(backends.autocast, context.device, amp)
    began = time.perf_counter()
    figures = engine.evaluate(
        distributed.spread(network, context), batches(), context.device, autocast
    )
    context.say(report.evaluation_line(figures, time.perf_counter() - began))
    if settings.output and settings.resume != resume.AUTO and context.is_main:
        inputs = {"checkpoint": source, "data": settings.data}
        print(
            f"written to {runs.write_evaluation(settings.output, {**figures, **inputs}, context)}"
        )
    return 0


def train(
    settings: ClassificationSettings,
    recipe: Recipe,
    start: Start,
    context: Context,
    stop: StopRequest,
) -> int:
    """Trains from the start, or on from a checkpoint, to the last epoch or until asked to stop."""
    seed = settings.seed if start.saved is None else start.saved["seed"]
    seed = distributed.share(runs.fresh_seed() if seed is None else seed, context)
    context.say(*backends.configure(settings.seed is not None, context.device))
    # Data first: what a user can have wrong is said before anything heavy.
    root = demo_sets.find_root(settings.data, context, settings.data_files, settings.download)
    data = open_training_data(root, recipe, start.saved, settings.typed, context)
    torch.manual_seed(seed)
    network = build_network(settings, recipe, start, data, context)
    reading = place(network, settings, context, compiled=settings.compile)
    state = begin_state(network, settings, recipe, start.saved, context)
    if state.epoch >= recipe.epochs:  # no fault: a scheduler may start a finished run once more
        context.say(f"all {recipe.epochs} epochs are done: give more with --epochs")
        return 0
    autocast = partial(backends.autocast, context.device, settings.amp)
    skip = settings.skip_bad_images
    batches = TaskBatches.of(data, recipe, seed, reading, context, skip)
    record = make_record(network_fields(network), settings.kept, recipe, seed, data, start.saved)
    files = open_files(settings, recipe, record, state, start, context)
    task = make_task(state, batches, recipe, autocast, settings.print_freq, context)
    if code := run_epochs(state, task, files, context, stop):
        return code
    files.close()
    context.say(*replaced_lines(data.train, state.all_broken()))
    context.say(*files.farewell(state.best, settings.data))
    return 0


def first_network(
    args: Namespace | ClassificationSettings,
    recipe: Recipe,
    pretrained: dict | None,
    classes: Sequence[str] | None = None,
) -> tuple[nn.Module, list[str]]:
    """Makes a new run's network, and says what became of the weights that it starts from."""
    asked = (recipe.arch, args.num_classes, args.ksize, args.attention, pretrained)
    with as_user_error():
        return start_weights.first_network(*asked, args.pretrained, classes, args.identity_start)


def build_network(
    settings: ClassificationSettings,
    recipe: Recipe,
    start: Start,
    data: TrainingData,
    context: Context,
) -> nn.Module:
    """Makes the network with its first or saved weights, and says what is trained and how."""
    if start.saved is not None:
        with as_user_error():
            network, notes = weights.network_from_checkpoint(start.saved), []
    else:
        network, notes = first_network(settings, recipe, start.pretrained, data.train.classes)
    tails = how_tails_run(network, settings, context, recipe.sync_bn)
    context.say(
        *report.data_lines(data.train, data.val),
        report.network_line(network),
        *notes,
        *device_lines(context, settings.amp, settings.channels_last, settings.compile, tails),
        *report.recipe_lines(recipe, settings.recipe or PAPER),
    )
    return network


def begin_state(
    network: nn.Module,
    settings: ClassificationSettings,
    recipe: Recipe,
    saved: dict | None,
    context: Context,
) -> RunState:
    """Makes all that changes in training, as it was saved."""
    fp16 = settings.amp == "fp16"
    state = first_state(network, recipe, context.device, context.rank, fp16, settings.compile)
    if saved is not None:
        state.restore(saved)
    if settings.start_epoch is not None:
        state.begin(settings.start_epoch)
    return state


def open_files(
    settings: ClassificationSettings,
    recipe: Recipe,
    record: dict,
    state: RunState,
    start: Start,
    context: Context,
) -> RunFiles:
    """Opens the run folder, which rank 0 alone writes."""
    place, name = None, runs.run_name(recipe.arch, settings.action)
    first = {"pretrained": settings.pretrained} if start.saved is None else {}
    record = {**record, **first, "environment": runs.environment(context)}
    if context.is_main:
        place = runs.open_folder(name, settings.output, start.folder)
        context.say(f"run folder: {place}")
    saving = Saving(settings.save_every, settings.save_minutes)
    log = {"title": name, "first_epoch": state.epoch, "saving": saving, "saved": start.saved}
    files = RunFiles(place, record, CLASSIFICATION, **log)
    if files.lacks_best():
        state.best = {}
    return files


def network_fields(network: nn.Module) -> dict:
    """Returns the fields of a checkpoint that say which network it holds."""
    parameters = sum(p.numel() for p in network.parameters())
    return {**weights.describe_network(network), "parameters": parameters}


def how_tails_run(
    network: nn.Module,
    settings: ClassificationSettings,
    context: Context,
    sync_bn: bool = False,
) -> str:
    dtype = backends.DTYPES[settings.amp]
    return models.describe_tails(
        network, context.device, settings.fused, dtype, settings.compile, sync_bn
    )


def place(
    network: nn.Module,
    settings: ClassificationSettings,
    context: Context,
    compiled: bool,
) -> Reading:
    """Puts the network on its device in its layout, and says how its batches are to be read."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    network.to(context.device, memory_format=layout)
    models.set_fused(network, settings.fused)
    if compiled:
        network.compile()
    reading = reading_of(settings.decoder)
    return reading(
        context.device, settings.workers, settings.worker_timeout, settings.decoder, layout
    )


if __name__ == "__main__":
    run_script(main)

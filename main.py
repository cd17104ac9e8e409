"""Trains and evaluates ECA-ResNets, and what they are compared with, on a folder of class folders.

examples:
  main.py -a eca_resnet50 --ksize 3557 DATA       all visible GPUs, one GPU, or the CPU
  torchrun --nproc-per-node=2 main.py … DATA      one process per GPU, faster
  main.py -e --resume CKPT DATA                   evaluate
  main.py --recipe modern DATA                    600 epochs for what the network can do
  main.py --resume auto                           go on with the newest run
  main.py demo:digits                             real images without a download
"""

import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

import models
from models import start, weights
from utils.classification import engine, report
from utils.classification.outcome import CLASSIFICATION
from utils.classification.state import first_state
from utils.data import demo_digits, splits
from utils.data.gpu_decoding import check_decoder, reading_of
from utils.data.loading import Reading, replaced_lines, training_batches, validation_batches
from utils.data.sampler import SeededBatches, check_batch, mix_seed
from utils.options.classification import OF_BLOCKS, OF_TRAINING, build_parser
from utils.options.common import NEVER_TAKEN, OF_ONE_START, saved_recipe
from utils.options.parser import refuse_idle, run_script
from utils.recipes.classification import PAPER, RECIPES, Recipe
from utils.recipes.schedules import UNUSED
from utils.runs import checkpoint, resume, resume_checks
from utils.runs import folder as runs
from utils.runs.writer import RunFiles, Saving
from utils.system import backends, distributed
from utils.system.errors import UserError, as_user_error
from utils.system.fault_messages import Memory, in_one_line
from utils.system.processes import default_workers
from utils.system.stop_requests import StopRequest
from utils.training.device_report import device_lines
from utils.training.epochs import Task, run_epochs

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
DEMO = {"arch": "eca_resnet18", **demo_digits.DIGITS_RECIPE}


def main(recipe: Recipe = RECIPE, demo: Mapping[str, object] = DEMO) -> int:
    """One run from the command line.

    Args:
        recipe: the script's default, the paper's.
        demo: what demo data needs otherwise, whatever the --recipe.
    """
    parser = build_parser(recipe, models.MODELS, __doc__.replace("main.py", Path(sys.argv[0]).name))
    args = asked = parser.parse_args()
    given = parser.given(vars(asked))
    on_demo = (args.data or "").startswith(demo_digits.PREFIX)
    recipe = recipe.override(**RECIPES[args.recipe or PAPER]).override(**demo if on_demo else {})
    of_any_run = args.data is None and args.arch is None and args.action is None
    name = None if of_any_run else runs.run_name(args.arch or recipe.arch, args.action)
    saved, folder = resume.read(
        args.resume, args.pretrained, name, args.output, args.evaluate, args.start_epoch
    )
    if saved is not None:
        with as_user_error():
            start.refuse_another(
                saved,
                args.resume or args.pretrained,
                args.arch,
                args.ksize,
                args.attention,
                args.num_classes,
            )
        if checkpoint.is_run(saved):
            source = str(args.resume or args.pretrained)
            parser.set_defaults(**parser.take_saved(saved["args"], NEVER_TAKEN, source))
            args = parser.parse_args()
            recipe = saved_recipe(parser, Recipe, saved["recipe"], source)
        else:
            recipe = recipe.override(**{k: saved.get(k) for k in ("img_size", "crop_pct")})
    recipe = recipe.override(**{k: v for k, v in vars(args).items() if k in recipe.as_dict()})
    refuse_idle(given, OF_TRAINING if args.evaluate else (), "with -e, which does not train")
    if args.fast:
        if not args.evaluate:
            raise UserError("--fast rebuilds a network for evaluation: it goes with -e")
        refuse_idle(given, OF_BLOCKS, "with --fast, which rebuilds the blocks")
        args.channels_last = True  # how it is rebuilt
    refuse_idle(given, UNUSED[recipe.schedule], f"with the schedule {recipe.schedule}")
    pretrained = None
    if saved is None:
        pretrained = args.pretrained and checkpoint.load(args.pretrained)
        with as_user_error(), torch.device("meta"):  # costs nothing, and finds what does not fit
            start.first_network(
                recipe.arch,
                args.num_classes,
                args.ksize,
                args.attention,
                pretrained,
                args.pretrained,
            )
    if not args.evaluate and (args.start_epoch or 0) >= recipe.epochs:
        raise UserError(
            f"--start-epoch {args.start_epoch}: the run has {recipe.epochs} epochs; give a smaller "
            "one, or more --epochs"
        )
    if args.data is None:
        raise UserError(f"no DATA given: a folder with train/ and val/, or {demo_digits.DIGITS}")
    if args.workers is None:  # a demo's images are so small that processes would cost more
        args.workers = 0 if args.data.startswith(demo_digits.PREFIX) else default_workers()

    needs = Memory(
        f"-b {recipe.batch_size}",
        "a smaller -b or --img-size, or --amp bf16",
        " or a smaller -b",
    )
    context = distributed.setup(args.device, args.gpu)
    try:
        if args.compile:
            distributed.refuse_compile(context)
        check_decoder(args.decoder, context.device)
        if args.evaluate:
            with in_one_line(needs):
                return evaluate(args, recipe, saved, context)
        with StopRequest() as stop, in_one_line(needs, stop):
            return train(args, asked, recipe, saved, pretrained, folder, context, stop)
    finally:
        distributed.tear_down()


def evaluate(args: Namespace, recipe: Recipe, saved: dict, context: distributed.Context) -> int:
    """Evaluates a checkpoint on the validation images, each once."""
    backends.configure(False, context.device)
    source = args.resume or args.pretrained
    classes = saved.get("classes")
    with as_user_error(f"{source}: "):
        network = weights.network_from_checkpoint(saved)
    root = demo_digits.find_root(args.data, context)
    _, images = splits.open_split(root, classes, with_train=False)
    distributed.refuse_differences(validation_images=len(images))
    if classes is None and len(images.classes) != network.num_classes:
        raise UserError(
            f"{images.root} has {len(images.classes)} class folders, {source} "
            f"{network.num_classes} classes without names: the numbers must agree"
        )
    tails = "" if args.fast else how_tails_run(network, args, context)
    context.say(
        *report.data_lines(None, images),
        report.network_line(network),
        *device_lines(context, args.amp, args.channels_last, args.compile, tails),
    )
    reading = place(network, args, context, compiled=args.compile and not args.fast)
    amp = args.amp
    if args.fast:
        dtype, amp = backends.DTYPES[amp], "off"
        network = models.optimise_for_inference(network, dtype, compile=args.compile)
        context.say(f"  rebuilt for inference: BatchNorm folded, weights in {dtype}")
    batches = validation_batches(images, recipe, reading, context.rank, context.world_size)
    autocast = partial(backends.autocast, context.device, amp)
    began = time.perf_counter()
    figures = engine.evaluate(
        distributed.spread(network, context), batches(), context.device, autocast
    )
    context.say(report.evaluation_line(figures, time.perf_counter() - began))
    if args.output and args.resume != resume.AUTO and context.is_main:
        inputs = {"checkpoint": str(source), "data": args.data}
        print(f"written to {runs.write_evaluation(args.output, {**figures, **inputs}, context)}")
    return 0


def train(
    args: Namespace,
    asked: Namespace,
    recipe: Recipe,
    saved: dict | None,
    pretrained: dict | None,
    folder: Path | None,
    context: distributed.Context,
    stop: StopRequest,
) -> int:
    """Trains from the start, or on from `saved`, to the last epoch or until asked to stop.

    `pretrained` is the contents of --pretrained, for a run from the start.
    """
    seed = args.seed if saved is None else saved["seed"]
    seed = distributed.share(runs.fresh_seed() if seed is None else seed, context)
    context.say(*backends.configure(args.seed is not None, context.device))

    # Data first: what a user can have wrong is said before anything heavy.
    train_images, val_images = splits.open_split(
        demo_digits.find_root(args.data, context), saved and saved["classes"]
    )
    distributed.refuse_differences(
        training_images=len(train_images),
        validation_images=len(val_images),
        checkpoint=saved and tuple(saved["progress"][k] for k in ("epoch", "step")),
    )
    check_batch(
        recipe.batch_size,
        len(train_images),
        context.replicas,
        recipe.crop_size,
        recipe.accumulate,
        recipe.repeats,
    )
    digest = resume_checks.digest(train_images.paths, train_images.labels)
    if recipe.sync_bn:
        distributed.refuse_sync_bn(context)
    if saved is not None:
        resume_checks.refuse_changes(
            saved, asked.seed, asked.batch_size, len(train_images), args.start_epoch
        )
        resume_checks.refuse_other_data(saved, digest, args.start_epoch)
        resume_checks.refuse_another_recipe(saved, asked.recipe, recipe, args.start_epoch)
    torch.manual_seed(seed)
    with as_user_error():
        if saved is not None:
            network, notes = weights.network_from_checkpoint(saved), []
        else:
            network, notes = start.first_network(
                recipe.arch,
                args.num_classes,
                args.ksize,
                args.attention,
                pretrained,
                args.pretrained,
                train_images.classes,
            )
    tails = how_tails_run(network, args, context, recipe.sync_bn)
    context.say(
        *report.data_lines(train_images, val_images),
        report.network_line(network),
        *notes,
        *device_lines(context, args.amp, args.channels_last, args.compile, tails),
        *report.recipe_lines(recipe, args.recipe or PAPER),
    )

    # All that changes from here on.
    reading = place(network, args, context, compiled=args.compile)
    state = first_state(
        network, recipe, context.device, context.rank, args.amp == "fp16", args.compile
    )
    if saved is not None:
        state.restore(saved)
    if args.start_epoch is not None:
        state.begin(args.start_epoch)
    if state.epoch >= recipe.epochs:  # no fault: a scheduler may start a finished run once more
        context.say(f"all {recipe.epochs} epochs are done: give more with --epochs")
        return 0

    # Batches, and how a step is done with each.
    order = SeededBatches(
        len(train_images),
        recipe.batch_size,
        seed,
        context.rank,
        context.world_size,
        recipe.repeats,
    )
    train_batches = training_batches(
        train_images, order, recipe, seed, reading, args.skip_bad_images
    )
    val_batches = validation_batches(val_images, recipe, reading, context.rank, context.world_size)
    autocast = partial(backends.autocast, context.device, args.amp)
    rule = engine.StepRule.of(
        recipe, order.steps, mix_seed(seed, context.rank), autocast, network.num_classes
    )

    # The run folder, which rank 0 alone writes.
    name = runs.run_name(recipe.arch, args.action)
    fixed = {
        **weights.describe_network(network),
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": list(train_images.classes),
        "img_size": recipe.img_size,
        "crop_pct": recipe.crop_pct,
        "recipe": recipe.as_dict(),
        "args": {k: v for k, v in vars(args).items() if k not in OF_ONE_START},
        "seed": seed,
        "train_digest": digest,
        "pretrained": args.pretrained if saved is None else saved.get("pretrained"),
        "train_images": len(train_images),
        "environment": runs.environment(context),
    }
    if context.is_main:
        folder = runs.open_folder(name, args.output, folder)
        context.say(f"run folder: {folder}")
    files = RunFiles(
        folder if context.is_main else None,
        fixed,
        CLASSIFICATION,
        title=name,
        first_epoch=state.epoch,
        saving=Saving(args.save_every, args.save_minutes),
        saved=saved,
    )

    if files.lacks_best():
        state.best = {}
    wrapped = distributed.wrap(network, context, recipe.sync_bn)
    evaluated = distributed.spread(state.evaluated, context)

    def steps(first_step: int):
        return engine.train_epoch(
            wrapped,
            train_batches(),
            state.optimizer,
            state.scaler,
            state.meter,
            state.guard,
            rule,
            first_step=first_step,
        )

    task = Task(
        CLASSIFICATION,
        order,
        steps,
        lambda stop: engine.evaluate(evaluated, val_batches(), context.device, autocast, stop),
        rule.lr_at,
        recipe.epochs,
        recipe.batch_size,
        args.print_freq,
    )
    if code := run_epochs(state, task, files, context, stop):
        return code
    files.close()
    context.say(*replaced_lines(train_images, state.all_broken()))
    context.say(*files.farewell(state.best, args.data))
    return 0


def how_tails_run(
    network: nn.Module, args: Namespace, context: distributed.Context, sync_bn: bool = False
) -> str:
    dtype = backends.DTYPES[args.amp]
    return models.describe_tails(network, context.device, args.fused, dtype, args.compile, sync_bn)


def place(
    network: nn.Module, args: Namespace, context: distributed.Context, compiled: bool
) -> Reading:
    """Puts the network on its device in its layout, and says how its batches are to be read."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    network.to(context.device, memory_format=layout)
    models.set_fused(network, args.fused)
    if compiled:
        network.compile()
    reading = reading_of(args.decoder)
    return reading(context.device, args.workers, args.worker_timeout, args.decoder, layout)


if __name__ == "__main__":
    run_script(main)

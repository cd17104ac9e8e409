"""Trains and evaluates Faster R-CNN, Mask R-CNN and RetinaNet with ECA backbones on COCO data.

examples:
  detect_main.py -a mask_rcnn -b eca_resnet50 --ksize 3557 --backbone-weights CKPT DATA
  torchrun --nproc-per-node=8 detect_main.py … DATA    one process per GPU
  detect_main.py -e --resume CKPT DATA                 evaluate: COCO's twelve figures
  detect_main.py --resume auto                         go on with the newest run
  detect_main.py demo:shapes                           real images without a download
"""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import models
from models.detection import detectors as detection
from models.detection.norms import NORMS
from models.detection.start import refuse_another_network, start_detector
from utils.data.loading import Reading
from utils.data.sampler import mix_seed
from utils.detection import demo_shapes, engine
from utils.detection import report as detection_report
from utils.detection.batches import (
    GroupedBatches,
    ValidationSet,
    check_batch,
    evaluation_batches,
    training_batches,
)
from utils.detection.coco_dataset import load_split
from utils.detection.coco_evaluation import judge, write_results
from utils.detection.coco_files import Place, locate
from utils.detection.outcome import DETECTION
from utils.detection.state import first_state
from utils.options.common import NEVER_TAKEN, OF_ONE_START, saved_recipe
from utils.options.detection import OF_TRAINING, build_parser
from utils.options.parser import refuse_idle, run_script
from utils.recipes.detection import AUTO, DetectionRecipe, lr_at
from utils.runs import checkpoint, resume, resume_checks
from utils.runs import folder as runs
from utils.runs.writer import RunFiles, Saving
from utils.system import backends, distributed
from utils.system import output_checks as outputs
from utils.system.errors import UserError, as_user_error
from utils.system.fault_messages import Memory, in_one_line
from utils.system.processes import default_workers
from utils.system.stop_requests import StopRequest
from utils.training import device_report
from utils.training.epochs import Task, run_epochs

RECIPE = DetectionRecipe()  # the paper's, for COCO

SMALLER = "a smaller --min-size, or --amp bf16"  # what spares memory
OF_A_NETWORK = ("arch", "backbone", "ksize", "norm", "trainable_layers", "legacy")
BACKBONES = [name for name in models.MODELS if "resnet" in name]


def main() -> int:
    """One run from the command line."""
    parser = build_parser(RECIPE, list(detection.DETECTORS), BACKBONES, NORMS, __doc__)
    args = asked = parser.parse_args()
    given = parser.given(vars(asked))
    if (args.results_json or args.picture) and not args.evaluate:
        raise UserError("--results-json and --picture go with -e: add it, or leave them out")
    on_demo = args.data == demo_shapes.SHAPES
    recipe = RECIPE.override(**demo_shapes.recipe_of(args.arch) if on_demo else {})
    of_any_run = not any((args.data, args.arch, args.backbone, args.action))
    name = runs.run_name(args.arch or recipe.arch, args.backbone or recipe.backbone, args.action)
    saved, folder = resume.read_detector(
        args.resume, None if of_any_run else name, args.output, args.evaluate
    )
    if saved is not None:
        with as_user_error(f"{args.resume} "):
            refuse_another_network(saved, {name: getattr(asked, name) for name in OF_A_NETWORK})
    if saved is not None and "recipe" in saved:
        source = str(args.resume)
        parser.set_defaults(**parser.take_saved(saved["args"], NEVER_TAKEN, source))
        args = parser.parse_args()
        recipe = saved_recipe(parser, DetectionRecipe, saved["recipe"], source)
    recipe = recipe.override(**{k: v for k, v in vars(args).items() if k in recipe.as_dict()})
    refuse_idle(given, OF_TRAINING if args.evaluate else (), "with -e, which does not train")
    refuse_idle(given, ("momentum",) if recipe.optimizer == "adamw" else (), "with adamw")
    if args.data is None:
        raise UserError(f"no DATA given: a folder in COCO's layout, or {demo_shapes.SHAPES}")
    if args.workers is None:  # the demo's images are so small that processes would cost more
        args.workers = 0 if args.data == demo_shapes.SHAPES else default_workers()

    context = distributed.setup(args.device, args.gpu)
    if context.data_parallel:
        print(
            f"{len(context.data_parallel)} GPUs: detectors run on one of them, or on all by "
            f"torchrun --nproc-per-node={len(context.data_parallel)}"
        )
        context = replace(context, data_parallel=())
    try:
        if args.evaluate:
            with in_one_line(Memory("one image at a time", SMALLER)):
                return evaluate(args, saved, context)
        needs = Memory(
            f"--batch-size {recipe.batch_size}",
            f"a smaller --batch-size, or {SMALLER}",
            " or a smaller --batch-size",
        )
        with StopRequest() as stop, in_one_line(needs, stop):
            return train(args, asked, recipe, saved, folder, context, stop)
    finally:
        distributed.tear_down()


def evaluate(args: Namespace, saved: dict, context: distributed.Context) -> int:
    """Evaluates a checkpoint on the validation images, each once."""
    backends.configure(False, context.device, one_shape=False)
    outputs.check_new_file(args.results_json)
    outputs.check_new_file(args.picture)
    sizes = {k: getattr(args, k) for k in ("min_size", "max_size") if getattr(args, k)}
    with as_user_error(f"{args.resume}: "):
        network = detection.detector_from_checkpoint(saved, **sizes)
    place = val_place(args, demo_shapes.find_root(args.data, context))
    val = ValidationSet(place, network.arch == "mask_rcnn", saved["classes"], args.resume)
    distributed.refuse_differences(validation_images=len(val.split))
    context.say(
        *val.lines,
        detection_report.network_line(network),
        *device_lines(network, args, context),
    )
    reading = put(network, args, context)
    first_label = detection.FIRST_LABEL[network.arch]
    batches = evaluation_batches(val.split, first_label, reading, context.rank, context.world_size)
    autocast = partial(backends.autocast, context.device, args.amp)
    began = time.perf_counter()
    found = engine.detect(network, batches(), val.category_ids, first_label, autocast)
    speed = len(val.split) / (time.perf_counter() - began)
    results, summaries = judge(found, val.truth, context)
    context.say(
        *detection_report.summary_lines(summaries),
        f"{len(val.split):,} images, {speed:,.1f} images/s",
    )
    if context.is_main:
        if args.results_json:
            write_results(Path(args.results_json), results)
            print(f"{len(results):,} detections written to {args.results_json}")
        if args.picture:
            detection_report.write_picture(Path(args.picture), place, val.masks, results)
            print(f"picture written to {args.picture}")
        if args.output and args.resume != resume.AUTO:
            figures = {kind: vars(summary) for kind, summary in summaries.items()}
            inputs = {"checkpoint": str(args.resume), "data": args.data, "images": len(val.split)}
            print(
                f"written to {runs.write_evaluation(args.output, {**figures, **inputs}, context)}"
            )
    return 0


def train(
    args: Namespace,
    asked: Namespace,
    recipe: DetectionRecipe,
    saved: dict | None,
    folder: Path | None,
    context: distributed.Context,
    stop: StopRequest,
) -> int:
    """Trains from the start, or on from `saved`, to the last epoch or until asked to stop."""
    given, recipe = recipe, recipe.resolved()
    seed = args.seed if saved is None else saved["seed"]
    seed = distributed.share(runs.fresh_seed() if seed is None else seed, context)
    context.say(*backends.configure(args.seed is not None, context.device, one_shape=False))

    # Data first: what a user can have wrong is said before anything heavy.
    masks, first_label = recipe.arch == "mask_rcnn", detection.FIRST_LABEL[recipe.arch]
    root = demo_shapes.find_root(args.data, context)
    train_split = load_split(train_place(args, root), masks, drop_empty=args.drop_empty)
    val = ValidationSet(
        val_place(args, root), masks, train_split.classes, "the training annotations"
    )
    distributed.refuse_differences(
        training_images=len(train_split),
        validation_images=len(val.split),
        checkpoint=saved and tuple(saved["progress"][k] for k in ("epoch", "step")),
    )
    check_batch(recipe.batch_size, len(train_split), context.world_size)
    names = "\0".join(train_split.file_names).encode("utf-8", "backslashreplace")
    digest = resume_checks.digest(names, train_split.boxes, train_split.labels)
    if saved is not None:
        if saved["classes"] != train_split.classes:
            raise UserError(f"{args.data} has other classes than the run: resume it with its data")
        resume_checks.refuse_changes(
            saved,
            asked.seed,
            asked.batch_size,
            len(train_split),
            None,
            "--batch-size",
            can_begin=False,
        )
        resume_checks.refuse_other_data(saved, digest, can_begin=False)
        resume_checks.refuse_another_optimizer(saved, recipe)
    torch.manual_seed(seed)
    network, notes = build_network(args, recipe, saved, len(train_split.classes) + first_label)
    if network.model_kwargs["norm"] == "sync" and context.device.type != "cuda":
        raise UserError("--norm sync runs on CUDA alone: give --norm bn")
    context.say(
        *train_split.report("train"),
        *val.lines,
        detection_report.network_line(network),
        *notes,
        *device_lines(network, args, context),
        detection_report.recipe_line(recipe, auto=given.lr == AUTO),
    )

    # All that changes from here on.
    reading = put(network, args, context)
    state = first_state(
        network,
        recipe,
        detection.LOSSES[recipe.arch],
        context.device,
        context.rank,
        args.amp == "fp16",
    )
    if saved is not None:
        state.restore(saved)
    if state.epoch >= recipe.epochs:  # no fault: a scheduler may start a finished run once more
        context.say(f"all {recipe.epochs} epochs are done: give more with --epochs")
        return 0

    # Batches, and the learning rate of each.
    order = GroupedBatches(
        train_split.sizes, recipe.batch_size, seed, context.rank, context.world_size
    )
    train_batches = training_batches(train_split, order, first_label, recipe.hflip, seed, reading)
    val_batches = evaluation_batches(
        val.split, first_label, reading, context.rank, context.world_size
    )
    rate = partial(lr_at, steps_per_epoch=order.steps, recipe=recipe)

    # The run folder, which rank 0 alone writes.
    name = runs.run_name(recipe.arch, recipe.backbone, args.action)
    fixed = {
        **detection.describe_detector(network),
        "classes": train_split.classes,
        "category_ids": train_split.category_ids,
        "recipe": given.as_dict(),  # with lr auto, for a resumption with another batch
        "args": {k: v for k, v in vars(args).items() if k not in OF_ONE_START},
        "seed": seed,
        "train_digest": digest,
        "train_images": len(train_split),
        "environment": runs.environment(context),
    }
    if context.is_main:
        folder = runs.open_folder(name, args.output, folder)
        context.say(f"run folder: {folder}")
    files = RunFiles(
        folder if context.is_main else None,
        fixed,
        DETECTION,
        title=name,
        first_epoch=state.epoch,
        saving=Saving(args.save_every, args.save_minutes),
        saved=saved,
    )

    if files.lacks_best():
        state.best = {}

    wrapped = distributed.wrap(network, context)
    autocast = partial(backends.autocast, context.device, args.amp)
    results = []

    def steps(first_step: int):
        return engine.train_epoch(
            wrapped,
            train_batches(),
            state.optimizer,
            state.meter,
            state.guard,
            first_step=first_step,
            lr_at=rate,
            clip=recipe.clip,
            seed=mix_seed(seed, context.rank),
            autocast=autocast,
            scaler=state.scaler,
        )

    def evaluated(stop: Callable[[], bool]):
        found = engine.detect(network, val_batches(), val.category_ids, first_label, autocast, stop)
        if found is None:
            return None
        of_all_ranks, summaries = judge(found, val.truth, context)
        results[:] = of_all_ranks or ()  # rank 0 alone has them
        return summaries

    task = Task(
        DETECTION,
        order,
        steps,
        evaluated,
        rate,
        recipe.epochs,
        recipe.batch_size,
        args.print_freq,
    )
    if code := run_epochs(state, task, files, context, stop):
        return code

    files.close()
    if context.is_main:
        picture = folder / "predictions.png"
        detection_report.write_picture(picture, val.place, masks, results)
        context.say(
            *detection_report.best_lines(state.best),
            *files.farewell(state.best, args.data),
            f"  last epoch's detections beside the ground truth: {picture}",
        )
    return 0


def train_place(args: Namespace, root: str) -> Place:
    return locate(root, "train", args.train_images, args.train_annotations)


def val_place(args: Namespace, root: str) -> Place:
    return locate(root, "val", args.val_images, args.val_annotations)


def build_network(
    args: Namespace, recipe: DetectionRecipe, saved: dict | None, outputs: int
) -> tuple[nn.Module, list[str]]:
    """The network with its first weights (saved, or with a backbone's, or fresh), and notes."""
    sizes = {"min_size": recipe.min_size, "max_size": recipe.max_size}
    with as_user_error():
        if saved is not None:
            return detection.detector_from_checkpoint(saved, **sizes), []
        weights = args.backbone_weights and checkpoint.load(args.backbone_weights)
        network, note = start_detector(
            recipe.arch,
            recipe.backbone,
            args.ksize,
            outputs,
            weights,
            args.norm,
            args.trainable_layers,
            legacy=args.legacy,
            **sizes,
            **recipe.settings,
        )
    return network, [note]


def device_lines(network: nn.Module, args: Namespace, context: distributed.Context) -> list[str]:
    last = is_channels_last(args, context)
    dtype = backends.DTYPES[args.amp]
    tails = models.describe_tails(network, context.device, args.fused, dtype)
    return device_report.device_lines(context, args.amp, last, compiled=False, tails=tails)


def is_channels_last(args: Namespace, context: distributed.Context) -> bool:
    """The layout asked for; by itself NHWC on the CPU, where NCHW is several times slower."""
    return context.device.type == "cpu" if args.channels_last is None else args.channels_last


def put(network: nn.Module, args: Namespace, context: distributed.Context) -> Reading:
    """Puts the network on its device in its layout, and says how its batches are to be read."""
    last = is_channels_last(args, context)
    layout = torch.channels_last if last else torch.contiguous_format
    network.to(context.device, memory_format=layout)
    models.set_fused(network, args.fused)
    return Reading(context.device, args.workers, args.worker_timeout)


if __name__ == "__main__":
    run_script(main)

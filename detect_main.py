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
from functools import partial

import torch

import models
from assembly import detector
from assembly.run_folder import open_files
from models.detection.detectors import DETECTORS, FIRST_LABEL, detector_from_checkpoint
from models.detection.norms import NORMS
from models.detection.start import refuse_another_network
from utils.detection import demo_shapes, report
from utils.detection.batches import ValidationSet
from utils.detection.outcome import DETECTION
from utils.detection.task import Evaluation, make_task
from utils.detection.training_data import open_detection_data
from utils.options.common import NEVER_TAKEN, saved_recipe
from utils.options.detection import build_parser
from utils.options.detection_refusals import notes_on, refuse_flags
from utils.options.parser import run_script
from utils.options.settings import DetectionSettings
from utils.recipes.detection import AUTO, DetectionRecipe
from utils.runs import folder as runs
from utils.runs import resume
from utils.runs.resume import Start
from utils.runs.saved_run import Checkpoint
from utils.system import backends, distributed, output_checks
from utils.system.distributed import Context
from utils.system.errors import as_user_error
from utils.system.fault_messages import Memory, in_one_line
from utils.system.processes import default_workers
from utils.system.stop_requests import StopRequest
from utils.training.epochs import run_epochs

RECIPE = DetectionRecipe()  # the paper's, for COCO
SMALLER = "a smaller --min-size, or --amp bf16"  # what spares memory
OF_A_NETWORK = ("arch", "backbone", "ksize", "norm", "trainable_layers", "legacy")
BACKBONES = [name for name in models.MODELS if "resnet" in name]


def main() -> int:
    """Does one run from the command line."""
    settings, recipe, start = read_command_line()
    context = distributed.on_one_gpu(distributed.setup(settings.device, settings.gpu))
    less = f"a smaller --batch-size, or {SMALLER}"
    try:
        if settings.evaluate:
            with in_one_line(Memory("one image at a time", SMALLER)):
                return evaluate(settings, start.saved, context)
        needs = Memory(
            f"--batch-size {recipe.batch_size}",
            less,
            " or a smaller --batch-size",
            settings.workers,
        )
        with StopRequest() as stop, in_one_line(needs, stop):
            return train(settings, recipe, start, context, stop)
    finally:
        distributed.tear_down()


def read_command_line() -> tuple[DetectionSettings, DetectionRecipe, Start]:
    """Parses the flags, finds the checkpoint, merges the recipe, and refuses what does not fit."""
    parser = build_parser(RECIPE, list(DETECTORS), BACKBONES, NORMS, __doc__)
    args = typed = parser.parse_args()
    given = parser.given(vars(typed))
    on_demo = args.data == demo_shapes.SHAPES
    recipe = RECIPE.override(**demo_shapes.recipe_of(args.arch) if on_demo else {})
    of_any_run = not any((args.data, args.arch, args.backbone, args.action))
    name = runs.run_name(args.arch or recipe.arch, args.backbone or recipe.backbone, args.action)
    name = None if of_any_run else name
    saved, folder = resume.read_detector(args.resume, name, args.output, args.evaluate)
    asked = {name: getattr(typed, name) for name in OF_A_NETWORK}
    if saved is not None:
        with as_user_error(f"{args.resume} "):
            refuse_another_network(saved.contents, asked)
    if saved is not None and saved.run is not None:
        source = str(args.resume)
        parser.set_defaults(**parser.take_saved(saved.run.flags, NEVER_TAKEN, source))
        args = parser.parse_args()
        recipe = saved_recipe(parser, DetectionRecipe, saved.run.recipe, source)
    refuse_flags(args, given, args.optimizer or recipe.optimizer)
    pretrained = None if saved else detector.read_first_weights(args, asked)
    if args.detector_weights and pretrained is not None:
        held = pretrained.contents
        recipe = recipe.override(arch=held["arch"], backbone=held["backbone"])
    recipe = recipe.override(**{k: v for k, v in vars(args).items() if k in recipe.as_dict()})
    if args.workers is None:  # the demo's images are so small that processes would cost more
        args.workers = 0 if args.data == demo_shapes.SHAPES else default_workers()
    return DetectionSettings.of(args, typed), recipe, Start(saved, pretrained, folder)


def evaluate(settings: DetectionSettings, saved: Checkpoint, context: Context) -> int:
    """Evaluates a checkpoint on the validation images, each once."""
    backends.configure(False, context.device, one_shape=False)
    output_checks.check_new_file(settings.results_json)
    output_checks.check_new_file(settings.picture)
    sizes = {"min_size": settings.min_size, "max_size": settings.max_size}
    with as_user_error(f"{saved.file}: "):
        network = detector_from_checkpoint(
            saved.contents, **{name: size for name, size in sizes.items() if size}
        )
    place = detector.place_of("val", settings, demo_shapes.find_root(settings.data, context))
    masks = network.arch == "mask_rcnn"
    val = ValidationSet(place, masks, list(saved.classes or ()), str(saved.file))
    distributed.refuse_differences(validation_images=len(val.split))
    context.say(
        *val.lines,
        report.network_line(network),
        *detector.how_it_runs(network, settings, context),
    )
    reading = detector.place(network, settings, context)
    autocast = partial(backends.autocast, context.device, settings.amp)
    judged_by = (FIRST_LABEL[network.arch], reading, autocast, context, settings.print_freq)
    evaluation = Evaluation(val, *judged_by)
    began = time.perf_counter()
    summaries = evaluation(network)
    speed = len(val.split) / (time.perf_counter() - began)
    context.say(
        *report.summary_lines(summaries),
        f"{len(val.split):,} images, {speed:,.1f} images/s",
    )
    if context.is_main:
        detector.write_evaluation(settings, evaluation, summaries, context)
    return 0


def train(
    settings: DetectionSettings,
    recipe: DetectionRecipe,
    start: Start,
    context: Context,
    stop: StopRequest,
) -> int:
    """Trains from the start, or on from a checkpoint, to the last epoch or until asked to stop."""
    given, recipe = recipe, recipe.resolved()
    seed = start.seed(settings.seed, context)
    context.say(*backends.configure(settings.seed is not None, context.device, one_shape=False))
    # Data first: what a user can have wrong is said before anything heavy.
    root = demo_shapes.find_root(settings.data, context)
    places = [detector.place_of(part, settings, root) for part in ("train", "val")]
    typed, drop_empty = settings.typed, settings.drop_empty
    data = open_detection_data(places, recipe, start.saved, typed, drop_empty, context)
    torch.manual_seed(seed)
    network, notes = detector.build_network(settings, recipe, start, data.train.classes, context)
    context.say(
        *data.lines,
        *notes,
        *detector.how_it_runs(network, settings, context),
        report.recipe_line(recipe, auto=given.lr == AUTO),
        *notes_on(recipe, len(data.train) // recipe.batch_size),
    )
    reading = detector.place(network, settings, context)
    state = detector.begin_state(network, settings, recipe, start.saved, context)
    if state.epoch >= recipe.epochs:  # no fault: a scheduler may start a finished run once more
        context.say(f"all {recipe.epochs} epochs are done: give more with --epochs")
        return 0
    autocast = partial(backends.autocast, context.device, settings.amp)
    judged_by = (FIRST_LABEL[recipe.arch], reading, autocast, context, settings.print_freq)
    evaluation = Evaluation(data.val, *judged_by)
    if settings.check_val:
        evaluation.check.now()
    record = detector.make_record(network, settings, given, seed, data)
    name = runs.run_name(recipe.arch, recipe.backbone, settings.action)
    files = open_files(settings, start, name, record, DETECTION, state, context)
    task = make_task(state, data, evaluation, recipe, seed, settings.print_freq)
    if code := run_epochs(state, task, files, context, stop):
        return code
    files.close()
    if context.is_main:
        picture = files.folder / "predictions.png"
        report.write_picture(picture, data.val.place, data.val.masks, evaluation.results)
        context.say(
            *report.best_lines(state.best),
            *files.farewell(state.best, settings.data),
            f"  last epoch's detections beside the ground truth: {picture}",
        )
    return 0


if __name__ == "__main__":
    run_script(main)

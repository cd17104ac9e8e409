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
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

import models
from assembly import classifier, evaluation, exported_file
from assembly.run_folder import open_files
from utils.classification import report
from utils.classification.outcome import CLASSIFICATION
from utils.classification.task import TaskBatches, make_task, why_ended
from utils.classification.training_data import open_training_data
from utils.data import demo_sets
from utils.data.gpu_decoding import check_decoder
from utils.data.loading import replaced_lines
from utils.options.classification import build_parser
from utils.options.common import NEVER_TAKEN, saved_recipe
from utils.options.parser import run_script
from utils.options.recipe_file import named_recipe
from utils.options.refusals import notes_on, refuse_flags, refuse_no_work
from utils.options.settings import ClassificationSettings
from utils.recipes.classification import PAPER, Recipe
from utils.runs import folder as runs
from utils.runs.resume import Start
from utils.runs.saved_run import Checkpoint
from utils.system import backends, distributed
from utils.system.distributed import Context
from utils.system.fault_messages import Memory, in_one_line
from utils.system.processes import default_workers
from utils.system.stop_requests import StopRequest
from utils.training.epochs import run_epochs

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
    settings, recipe, start = read_command_line(recipe, demos, description)
    needs = Memory(f"-b {recipe.batch_size}", SMALLER, " or a smaller -b", settings.workers)
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
    recipe: Recipe, demos: Mapping[str, Mapping[str, object]], description: str
) -> tuple[ClassificationSettings, Recipe, Start]:
    """Parses the flags, finds the checkpoint, merges the recipe, and refuses what does not fit."""
    paper = recipe
    parser = build_parser(recipe, models.MODELS, description)
    args = typed = parser.parse_args()
    given = parser.given(vars(typed))
    recipe = named_recipe(parser, recipe, args.recipe, demos.get(args.data, {}))
    of_any_run = args.data is None and args.arch is None and args.action is None
    name = None if of_any_run else runs.run_name(args.arch or recipe.arch, args.action)
    saved, folder = exported_file.read_saved(args, given, name)
    if saved is not None:
        source = str(args.resume or args.pretrained)
        classifier.refuse_another(saved, source, args)
        if saved.run is not None:
            parser.set_defaults(**parser.take_saved(saved.run.flags, NEVER_TAKEN, source))
            args = parser.parse_args()
            recipe = saved_recipe(parser, Recipe, saved.run.recipe, source)
        else:
            recipe = recipe.override(img_size=saved.img_size, crop_pct=saved.crop_pct)
            parser.set_defaults(**exported_file.own_defaults(saved))
            args = parser.parse_args()
    recipe = recipe.override(**{k: v for k, v in vars(args).items() if k in recipe.as_dict()})
    refuse_flags(args, given, recipe)
    pretrained = None
    if saved is None:
        pretrained = Checkpoint.read(Path(args.pretrained)) if args.pretrained else None
        with torch.device("meta"):  # costs nothing, and finds what does not fit
            classifier.first_network(args, recipe, pretrained)
    refuse_no_work(args, recipe)
    on_demo = demo_sets.is_demo(args.data)
    if args.workers is None:  # a demo's images are so small that processes would cost more
        args.workers = 0 if on_demo else default_workers()
    args.channels_last |= args.fast  # how --fast rebuilds
    notes = notes_on(recipe, paper, on_demo or args.recipe not in (None, PAPER))
    return ClassificationSettings.of(args, typed), recipe, Start(saved, pretrained, folder, notes)


def evaluate(
    settings: ClassificationSettings, recipe: Recipe, saved: Checkpoint, context: Context
) -> int:
    """Evaluates a checkpoint on the validation images, each once."""
    backends.configure(False, context.device)
    network, lines = classifier.saved_network(saved, settings, context)
    root = demo_sets.find_root(settings.data, context, settings.data_files, settings.download)
    data = classifier.open_evaluation(root, saved, network, settings)
    context.say(*data.lines(), *lines)
    reading = classifier.place(network, settings, context)
    if settings.fast:
        dtype = backends.DTYPES[settings.amp]
        network = models.optimise_for_inference(network, dtype, compile=settings.compile)
        context.say(f"  rebuilt for inference: BatchNorm folded, weights in {dtype}")
    evaluation.judge_and_write(network, data, recipe, settings, reading, saved, context)
    return 0


def train(
    settings: ClassificationSettings,
    recipe: Recipe,
    start: Start,
    context: Context,
    stop: StopRequest,
) -> int:
    """Trains from the start, or on from a checkpoint, to the last epoch or until asked to stop."""
    seed = start.seed(settings.seed, context)
    context.say(*backends.configure(settings.seed is not None, context.device))
    # Data first: what a user can have wrong is said before anything heavy.
    root = demo_sets.find_root(settings.data, context, settings.data_files, settings.download)
    data = open_training_data(root, recipe, start.saved, settings.typed, context)
    torch.manual_seed(seed)
    network, notes = classifier.build_network(settings, recipe, start, data.train.classes)
    context.say(
        *report.data_lines(data.train, data.val, data.class_weights),
        *notes,
        *classifier.how_it_trains(network, settings, recipe, context),
        *start.notes,
    )
    reading = classifier.place(network, settings, context)
    state = classifier.begin_state(network, settings, recipe, start.saved, context)
    if ended := why_ended(state, recipe):
        context.say(ended, *evaluation.how_to_report(settings, start))
        return 0
    autocast = partial(backends.autocast, context.device, settings.amp)
    batches = TaskBatches.of(data, recipe, seed, reading, context, settings.skip_bad_images)
    if settings.check_val:
        batches.check.now()
    record = classifier.make_record(network, settings, recipe, seed, data, start)
    name = runs.run_name(recipe.arch, settings.action)
    files = open_files(settings, start, name, record, CLASSIFICATION, state, context)
    task = make_task(state, batches, recipe, autocast, settings.print_freq, context)
    if code := run_epochs(state, task, files, context, stop):
        return code
    files.close()
    context.say(*replaced_lines(data.train, state.all_broken()))
    context.say(*files.farewell(state.best, settings.data, state.epoch < recipe.epochs))
    if settings.report:
        parts = (state, files, data.val, batches, recipe, settings, autocast, context, stop)
        return evaluation.report_run(*parts)
    return 0


if __name__ == "__main__":
    run_script(main)

"""Refuses flags of main.py that contradict each other, and notes doubtful ones."""

import argparse
import math

from utils.data.demo_sets import DEMOS, takes_files
from utils.options.classification import OF_BLOCKS, OF_EVALUATION, OF_TRAINING
from utils.options.parser import refuse_idle
from utils.recipes.classification import Recipe
from utils.recipes.schedules import UNUSED
from utils.system.errors import UserError
from utils.system.optional_packages import require
from utils.system.text import printable

FAMILIES = {"resnet": "ResNets", "mobilenet": "MobileNetV2"}
USUAL = {"adamw": 1e-3, "lamb": 5e-3}  # learning rates of published recipes
SCRIPTS = {"resnet": "main.py", "mobilenet": "light_main.py"}


def refuse_flags(args: argparse.Namespace, given: set[str], recipe: Recipe) -> None:
    """Refuses flags that contradict each other, or would do nothing.

    Args:
        args: the flags, with a resumed run's own among them.
        given: names of those that were typed, as `Parser.given` has them.

    Raises:
        UserError: one line with the flags.
    """
    refuse_idle(given, OF_TRAINING if args.evaluate else (), "with -e, which does not train")
    if args.identity_start and args.resume not in (None, "auto"):
        raise UserError(
            f"--identity-start is for new attention, and --resume {args.resume} goes on with a "
            "run: leave it out"
        )
    if args.fast:
        if not args.evaluate:
            raise UserError("--fast rebuilds a network for evaluation: it goes with -e")
        refuse_idle(given, OF_BLOCKS, "with --fast, which rebuilds the blocks")
    if not args.evaluate:
        refuse_idle(given, OF_EVALUATION, "without -e: a run is judged by the data's own labels")
    if args.real_labels and args.present_classes:
        raise UserError(
            "--real-labels compares all outputs, and --present-classes some: give one of them"
        )
    refuse_idle(given, UNUSED[recipe.schedule], f"with the schedule {recipe.schedule}")
    if recipe.loss != "bce":
        refuse_idle(given, ("bce_threshold",), f"with the loss {recipe.loss}")
    if recipe.optimizer != "sgd":
        refuse_idle(given, ("momentum",), f"with {recipe.optimizer}")
    if recipe.optimizer == "lamb" and not args.evaluate:
        require(("timm",), "--optimizer lamb", "timm")


def refuse_for_exported(args: argparse.Namespace, given: set[str], file: str) -> None:
    """Refuses flags that a file of export.py has no use for.

    Args:
        args: the flags.
        given: names of those that were typed, as `Parser.given` has them.
        file: as the command line named it.

    Raises:
        UserError: one line with the flag.
    """
    if not args.evaluate:
        raise UserError(
            f"{file}: a file of export.py is not trained: evaluate it with -e --resume {file}, or "
            "give the checkpoint that it came from"
        )
    for name, reason in {
        "fast": "an exported network is rebuilt already",
        "compile": "an exported network has an engine of its own",
        "amp": "an exported network has a precision of its own",
        "channels_last": "an exported network has a layout of its own",
        "no_fused": "an exported network has no blocks to take apart",
    }.items():
        if name in given:
            raise UserError(
                f"--{name.replace('_', '-')}: {reason}; leave it out, or give the checkpoint"
            )
    chosen = {"--gpu": args.gpu, "--device": None if args.device == "auto" else args.device}
    for flag, value in chosen.items():
        if value not in (None, "cpu"):
            raise UserError(
                f"{flag} {value}: {file} is run on the CPU; leave it out, or give the checkpoint"
            )


def refuse_no_work(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuses a start with no epoch left by --start-epoch, without DATA, or with idle files for it.

    Raises:
        UserError: one line with the remedy.
    """
    if not args.evaluate and (args.start_epoch or 0) >= recipe.epochs:
        raise UserError(
            f"--start-epoch {args.start_epoch}: the run has {recipe.epochs} epochs; give a smaller "
            "one, or more --epochs"
        )
    if args.data is None:
        raise UserError(f"no DATA given: a folder with train/ and val/, or one of {DEMOS}")
    if (args.data_files or args.download) and not takes_files(args.data):
        flag = "--download" if args.download else "--data-files"
        raise UserError(f"{flag} does nothing with {printable(args.data)}: leave it out")
    if args.data_files and args.download:
        raise UserError("--data-files and --download are two ways to the same: give one of them")


def notes_on(recipe: Recipe, paper: Recipe, other_numbers: bool) -> tuple[str, ...]:
    """Returns lines on a recipe that can be meant, but hardly is.

    Args:
        recipe: of the run.
        paper: what the script proposes for its own family of networks.
        other_numbers: the numbers are not the script's, but those of a --recipe or of demo data.
    """
    notes = []
    if not other_numbers and _family(recipe.arch) != _family(paper.arch):
        notes.append(
            f"! {recipe.arch} trains by the paper's numbers for {FAMILIES[_family(paper.arch)]}; "
            f"those for {FAMILIES[_family(recipe.arch)]} come with {SCRIPTS[_family(recipe.arch)]}"
        )
    usual = USUAL.get(recipe.optimizer, math.inf)
    if recipe.lr >= 10 * usual:
        notes.append(
            f"! a learning rate of {recipe.lr:g} is one for SGD: for {recipe.optimizer} rates near "
            f"{usual:g} are usual; give --lr"
        )
    if recipe.warmup_epochs > recipe.epochs:
        notes.append(
            f"! the warm-up takes {recipe.warmup_epochs:g} epochs and the run has {recipe.epochs}: "
            f"the learning rate never reaches {recipe.lr:g}"
        )
    return tuple(notes)


def _family(arch: str) -> str:
    return "mobilenet" if "mobilenet" in arch else "resnet"

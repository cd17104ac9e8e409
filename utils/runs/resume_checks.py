"""Refuses flags and data that may not change when a run continues."""

import hashlib

import numpy as np
import torch

from utils.recipes.classification import PAPER, Recipe
from utils.recipes.detection import DetectionRecipe
from utils.runs.saved_run import SavedRun
from utils.system.errors import UserError


def refuse_changes(
    run: SavedRun,
    seed: int | None,
    batch_size: int | None,
    train_images: int,
    at_epoch: int | None,
    batch_flag: str = "-b",
    can_begin: bool = True,
) -> None:
    """Refuses a resumption that could not be exact.

    Args:
        run: that goes on.
        seed, batch_size: as given on the command line, or None.
        train_images: how many there are now.
        at_epoch: --start-epoch, which gives up the place inside an epoch.
        batch_flag: the script's name for `batch_size`.
        can_begin: whether the script has --start-epoch.

    Raises:
        UserError: another seed; another batch size or data set inside an epoch.
    """
    if seed is not None and seed != run.seed:
        raise UserError(f"the run's seed is {run.seed}: leave --seed {seed} out")
    step = run.step
    if not step or at_epoch is not None:
        return
    remedy = ", or begin at an epoch's start with --start-epoch" if can_begin else ""
    held = run.recipe["batch_size"]
    if batch_size not in (None, held):
        raise UserError(
            f"the run stopped inside an epoch, after {step} batches of {held}: leave "
            f"{batch_flag} {batch_size} out{remedy}"
        )
    if train_images != run.train_images:
        raise UserError(
            f"the run stopped inside an epoch over {run.train_images:,} training images, and "
            f"there are {train_images:,} now: restore the data{remedy}"
        )


def digest(*parts: bytes | np.ndarray) -> str:
    """Returns a short name for data: equal where the same names and labels have the same order."""
    code = hashlib.blake2b(digest_size=8)
    for part in parts:
        code.update(part if isinstance(part, bytes) else part.tobytes())
    return code.hexdigest()


def refuse_other_data(
    run: SavedRun, data: str, at_epoch: int | None = None, can_begin: bool = True
) -> list[str]:
    """Refuses a resumption inside an epoch over as many images, but not the same ones.

    Args:
        run: that goes on; one of before there were digests is not looked at.
        data: the `digest` of what there is now.
        at_epoch, can_begin: --start-epoch, and whether the script has it.

    Returns:
        A line for the user where the data changed and the run stands between two epochs.

    Raises:
        UserError: names or labels differ.
    """
    if run.train_digest in (None, data):
        return []
    if run.step and at_epoch is None:
        remedy = ", or begin at an epoch's start with --start-epoch" if can_begin else ""
        raise UserError(
            "the run stopped inside an epoch over training images with other names or labels than "
            f"there are now: restore the data{remedy}"
        )
    return [
        "! the training images have other names or labels than those that the run began with: it "
        "goes on with what is there now"
    ]


def other_threads(run: SavedRun, device: torch.device) -> list[str]:
    """Returns a line for the user where a run on the CPU goes on with another number of threads.

    A sum that is shared among threads is rounded otherwise for each number of them.
    """
    now = torch.get_num_threads()
    if device.type != "cpu" or run.cpu_threads in (None, now):
        return []
    return [
        f"! the run was computed by {run.cpu_threads} threads, and goes on with {now}: sums are "
        "rounded otherwise, so it will not end bit for bit as it would have; set "
        f"OMP_NUM_THREADS={run.cpu_threads} for that"
    ]


def refuse_another_recipe(
    run: SavedRun, name: str | None, recipe: Recipe, at_epoch: int | None
) -> None:
    """Refuses a resumption whose flags ask for what the saved state cannot follow.

    Args:
        run: that goes on.
        name: --recipe, or None.
        recipe: the saved one with this start's flags.
        at_epoch: --start-epoch.

    Raises:
        UserError: another recipe by name; another optimizer; other copies or order of images inside
            an epoch; other parameters with weight decay, whose momentum is saved by their order.
    """
    held = Recipe.from_dict(run.recipe)
    held_name = run.flags.get("recipe") or PAPER
    if name not in (None, held_name):
        raise UserError(
            f"the run's recipe is {held_name}: leave --recipe {name} out (flags such as --epochs "
            "change single values)"
        )
    if recipe.norm_decay != held.norm_decay:
        verb, flag = ("spares", "") if recipe.norm_decay else ("decays", "no-")
        raise UserError(
            f"the run {verb} norms, biases and ECA kernels: leave --{flag}norm-decay out"
        )
    if recipe.optimizer != held.optimizer:
        raise UserError(_another_optimizer(held.optimizer, recipe.optimizer))
    if recipe.freeze != held.freeze:
        raise UserError(
            f"the run's --freeze is {held.freeze}: leave --freeze {recipe.freeze} out, or begin "
            "a new run at its weights with --pretrained"
        )
    if recipe.layer_decay != held.layer_decay:
        raise UserError(
            f"the run's --layer-decay is {held.layer_decay:g}: leave --layer-decay "
            f"{recipe.layer_decay:g} out"
        )
    if run.step and at_epoch is None and recipe.repeats != held.repeats:
        raise UserError(
            f"the run stopped inside an epoch with each image {held.repeats} times a batch: leave "
            f"--repeats {recipe.repeats} out, or begin at an epoch's start with --start-epoch"
        )
    if run.step and at_epoch is None and recipe.sampler != held.sampler:
        raise UserError(
            f"the run stopped inside an epoch of the sampler {held.sampler}: leave --sampler "
            f"{recipe.sampler} out, or begin at an epoch's start with --start-epoch"
        )


def refuse_another_optimizer(run: SavedRun, recipe: DetectionRecipe) -> None:
    """Refuses a detector's resumption that cannot use the saved optimizer's state.

    Raises:
        UserError: names the run's optimizer.
    """
    held = DetectionRecipe.from_dict(run.recipe).optimizer
    if recipe.optimizer != held:
        raise UserError(_another_optimizer(held, recipe.optimizer))


def _another_optimizer(held: str, asked: str) -> str:
    return f"the run's optimizer is {held}: leave --optimizer {asked} out"

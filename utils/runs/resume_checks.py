"""Which flags and data may not change when a run goes on."""

import hashlib

import numpy as np

from utils.recipes.classification import PAPER, Recipe
from utils.recipes.detection import DetectionRecipe
from utils.system.errors import UserError


def refuse_changes(
    saved: dict,
    seed: int | None,
    batch_size: int | None,
    train_images: int,
    at_epoch: int | None,
    batch_flag: str = "-b",
    can_begin: bool = True,
) -> None:
    """Stops a resumption that could not be exact.

    Args:
        saved: the checkpoint.
        seed, batch_size: as given on the command line, or None.
        train_images: how many there are now.
        at_epoch: --start-epoch, which gives up the place inside an epoch.
        batch_flag: the script's name for `batch_size`.
        can_begin: whether the script has --start-epoch.

    Raises:
        UserError: another seed; another batch size or data set inside an epoch.
    """
    if seed is not None and seed != saved["seed"]:
        raise UserError(f"the run's seed is {saved['seed']}: leave --seed {seed} out")
    step = saved["progress"]["step"]
    if not step or at_epoch is not None:
        return
    remedy = ", or begin at an epoch's start with --start-epoch" if can_begin else ""
    held = saved["recipe"]["batch_size"]
    if batch_size not in (None, held):
        raise UserError(
            f"the run stopped inside an epoch, after {step} batches of {held}: leave "
            f"{batch_flag} {batch_size} out{remedy}"
        )
    if train_images != saved["train_images"]:
        raise UserError(
            f"the run stopped inside an epoch over {saved['train_images']:,} training images, and "
            f"there are {train_images:,} now: restore the data{remedy}"
        )


def digest(*parts: bytes | np.ndarray) -> str:
    """A short name for data: equal where the same names and labels come in the same order."""
    code = hashlib.blake2b(digest_size=8)
    for part in parts:
        code.update(part if isinstance(part, bytes) else part.tobytes())
    return code.hexdigest()


def refuse_other_data(
    saved: dict, data: str, at_epoch: int | None = None, can_begin: bool = True
) -> None:
    """Stops a resumption inside an epoch over as many images, but not the same.

    Args:
        saved: the checkpoint; one of before there were digests is not looked at.
        data: the `digest` of what there is now.
        at_epoch, can_begin: --start-epoch, and whether the script has it.

    Raises:
        UserError: names or labels differ.
    """
    inside = saved["progress"]["step"] and at_epoch is None
    if inside and saved.get("train_digest", data) != data:
        remedy = ", or begin at an epoch's start with --start-epoch" if can_begin else ""
        raise UserError(
            "the run stopped inside an epoch over training images with other names or labels than "
            f"there are now: restore the data{remedy}"
        )


def refuse_another_recipe(
    saved: dict, name: str | None, recipe: Recipe, at_epoch: int | None
) -> None:
    """Stops a resumption whose flags ask for what cannot be taken up.

    Args:
        saved: the checkpoint.
        name: --recipe, or None.
        recipe: the saved one with this start's flags.
        at_epoch: --start-epoch.

    Raises:
        UserError: another recipe by name; other copies of images inside an epoch; other parameters
            with weight decay, whose momentum is saved by their order.
    """
    held = Recipe.from_dict(saved["recipe"])
    held_name = saved["args"].get("recipe") or PAPER
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
    if saved["progress"]["step"] and at_epoch is None and recipe.repeats != held.repeats:
        raise UserError(
            f"the run stopped inside an epoch with each image {held.repeats} times a batch: leave "
            f"--repeats {recipe.repeats} out, or begin at an epoch's start with --start-epoch"
        )


def refuse_another_optimizer(saved: dict, recipe: DetectionRecipe) -> None:
    """Stops a detector's resumption that cannot use the saved optimizer's state.

    Raises:
        UserError: names the run's optimizer.
    """
    held = DetectionRecipe.from_dict(saved["recipe"]).optimizer
    if recipe.optimizer != held:
        raise UserError(f"the run's optimizer is {held}: leave --optimizer {recipe.optimizer} out")

"""Opens a classifier's training data and checks it against the recipe and the saved run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.data import splits
from utils.data.class_weights import BALANCED, class_weights
from utils.data.image_folder import ImageFolder
from utils.data.sampler import check_batch
from utils.recipes.classification import Recipe
from utils.runs import resume_checks
from utils.runs.saved_run import Checkpoint
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.system.text import printable


@dataclass(frozen=True)
class TrainingData:
    """Holds images to train on and to validate on; `digest` names the former.

    `class_weights` are those of the loss, by label; None for 1.
    """

    train: ImageFolder
    val: ImageFolder
    digest: str
    class_weights: tuple[float, ...] | None = None


def open_training_data(
    root: str, recipe: Recipe, saved: Checkpoint | None, typed: Mapping[str, Any], context: Context
) -> TrainingData:
    """Opens the data and refuses what cannot be trained on, or gone on with.

    Args:
        root: the data folder.
        saved: the checkpoint that the run goes on from, or None.
        typed: seed, batch_size, recipe, start_epoch and class_weights as given on the command line.

    Raises:
        UserError: one line, see `open_split`, `check_batch` and `utils.runs.resume_checks`.
    """
    run = None if saved is None else saved.run
    train, val = splits.open_split(root, saved and saved.classes)
    distributed.refuse_differences(
        training_images=len(train),
        validation_images=len(val),
        checkpoint=run and run.place,
    )
    check_batch(
        recipe.batch_size,
        len(train),
        context.replicas,
        recipe.crop_size,
        recipe.accumulate,
        recipe.repeats,
    )
    digest = resume_checks.digest(train.paths, train.labels)
    if recipe.sync_bn:
        distributed.refuse_sync_bn(context)
    if run is not None:
        at = typed["start_epoch"]
        resume_checks.refuse_changes(run, typed["seed"], typed["batch_size"], len(train), at)
        context.say(*resume_checks.refuse_other_data(run, digest, at))
        resume_checks.refuse_another_recipe(run, typed["recipe"], recipe, at)
        context.say(*resume_checks.other_threads(run, context.device))
    weights = _class_weights(typed["class_weights"], saved, train)
    return TrainingData(train, val, digest, weights)


def _class_weights(
    asked: str | None, saved: Checkpoint | None, train: ImageFolder
) -> tuple[float, ...] | None:
    """Returns the loss's weights by label: those that the run was saved with, where it goes on.

    Raises:
        UserError: other weights are asked for than the run's, or as in `class_weights`.
    """
    if saved is None or saved.run is None:
        return None if asked is None else class_weights(asked, train)
    held = saved.contents.get("class_weights")
    name = saved.run.flags.get("class_weights")
    if asked is not None:
        if asked != name:
            raise UserError(
                f"the run's class weights are {printable(name or 'none')}: leave --class-weights "
                f"{printable(asked)} out"
            )
        if asked != BALANCED and held is not None and class_weights(asked, train) != tuple(held):
            raise UserError(
                f"{printable(asked)} holds other weights than the run began with: leave "
                "--class-weights out to go on with those"
            )
    if held is not None and len(held) != len(train.classes):
        raise UserError(
            f"{saved.file}: holds {len(held)} class weights for {len(train.classes)} classes; give "
            "a checkpoint as the scripts write it"
        )
    return None if held is None else tuple(held)

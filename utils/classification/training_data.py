"""Opens a classifier's training data and checks it against the recipe and the saved run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.data import splits
from utils.data.image_folder import ImageFolder
from utils.data.sampler import check_batch
from utils.recipes.classification import Recipe
from utils.runs import resume_checks
from utils.runs.saved_run import Checkpoint
from utils.system import distributed
from utils.system.distributed import Context


@dataclass(frozen=True)
class TrainingData:
    """Holds images to train on and to validate on; `digest` names the former."""

    train: ImageFolder
    val: ImageFolder
    digest: str


def open_training_data(
    root: str, recipe: Recipe, saved: Checkpoint | None, typed: Mapping[str, Any], context: Context
) -> TrainingData:
    """Opens the data and refuses what cannot be trained on, or gone on with.

    Args:
        root: the data folder.
        saved: the checkpoint that the run goes on from, or None.
        typed: seed, batch_size, recipe and start_epoch as given on the command line.

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
    return TrainingData(train, val, digest)

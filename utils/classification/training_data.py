"""The two sides of a classifier's data, checked against the recipe and the run that goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.data import splits
from utils.data.image_folder import ImageFolder
from utils.data.sampler import check_batch
from utils.recipes.classification import Recipe
from utils.runs import resume_checks
from utils.system import distributed
from utils.system.distributed import Context


@dataclass(frozen=True)
class TrainingData:
    """Images to train on and to validate on; `digest` names the former."""

    train: ImageFolder
    val: ImageFolder
    digest: str


def open_training_data(
    root: str, recipe: Recipe, saved: dict | None, typed: Mapping[str, Any], context: Context
) -> TrainingData:
    """Opens the data and refuses what cannot be trained on, or gone on with.

    Args:
        root: the data folder.
        saved: the checkpoint that the run goes on from, or None.
        typed: seed, batch_size, recipe and start_epoch as given on the command line.

    Raises:
        UserError: one line, see `open_split`, `check_batch` and `utils.runs.resume_checks`.
    """
    train, val = splits.open_split(root, saved and saved["classes"])
    distributed.refuse_differences(
        training_images=len(train),
        validation_images=len(val),
        checkpoint=saved and tuple(saved["progress"][k] for k in ("epoch", "step")),
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
    if saved is not None:
        at = typed["start_epoch"]
        resume_checks.refuse_changes(saved, typed["seed"], typed["batch_size"], len(train), at)
        resume_checks.refuse_other_data(saved, digest, at)
        resume_checks.refuse_another_recipe(saved, typed["recipe"], recipe, at)
    return TrainingData(train, val, digest)


def make_record(
    network: Mapping[str, Any],
    flags: Mapping[str, Any],
    recipe: Recipe,
    seed: int,
    data: TrainingData,
    saved: dict | None,
) -> dict[str, Any]:
    """Returns what every checkpoint of a run holds besides the state, but for the environment.

    Args:
        network: the fields that say which network it is.
        flags: of the command line, those that a checkpoint keeps.
        saved: the checkpoint that the run goes on from, or None.
    """
    return {
        **network,
        "classes": list(data.train.classes),
        "img_size": recipe.img_size,
        "crop_pct": recipe.crop_pct,
        "recipe": recipe.as_dict(),
        "args": dict(flags),
        "seed": seed,
        "train_digest": data.digest,
        "pretrained": None if saved is None else saved.get("pretrained"),
        "train_images": len(data.train),
    }

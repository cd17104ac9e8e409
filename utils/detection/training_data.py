"""Opens a detector's data and checks it against the recipe and the saved run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.detection.batches import ValidationSet, check_batch
from utils.detection.coco_dataset import CocoSplit, load_split
from utils.detection.coco_files import Place
from utils.recipes.detection import DetectionRecipe
from utils.runs import resume_checks
from utils.runs.saved_run import Checkpoint
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import UserError


@dataclass(frozen=True)
class DetectionData:
    """Holds images to train on and to validate on; `digest` names the former with their objects."""

    train: CocoSplit
    val: ValidationSet
    digest: str

    @property
    def lines(self) -> list[str]:
        """Returns counts of train and val, and what a user should check."""
        return [*self.train.report("train"), *self.val.lines]


def open_detection_data(
    places: Sequence[Place],
    recipe: DetectionRecipe,
    saved: Checkpoint | None,
    typed: Mapping[str, Any],
    drop_empty: bool,
    context: Context,
) -> DetectionData:
    """Opens the data and refuses what cannot be trained on, or gone on with.

    Args:
        places: of the training and of the validation images.
        saved: the checkpoint that the run goes on from, or None.
        typed: seed and batch_size as given on the command line.
        drop_empty: leave images without objects out of training.

    Raises:
        UserError: one line, see `load_split`, `ValidationSet`, `check_batch` and
            `utils.runs.resume_checks`.
    """
    run = None if saved is None else saved.run
    masks = recipe.arch == "mask_rcnn"
    train = load_split(places[0], masks, drop_empty=drop_empty)
    val = ValidationSet(places[1], masks, train.classes, "the training annotations")
    distributed.refuse_differences(
        training_images=len(train),
        validation_images=len(val.split),
        checkpoint=run and run.place,
    )
    check_batch(recipe.batch_size, len(train), context.world_size)
    names = "\0".join(train.file_names).encode("utf-8", "backslashreplace")
    digest = resume_checks.digest(names, train.boxes, train.labels)
    if saved is not None and run is not None:
        if list(saved.classes or ()) != list(train.classes):
            raise UserError(
                f"{places[0].annotations} has other classes than the run: resume it with its data"
            )
        resume_checks.refuse_changes(
            run, typed["seed"], typed["batch_size"], len(train), None, "--batch-size", False
        )
        context.say(*resume_checks.refuse_other_data(run, digest, can_begin=False))
        resume_checks.refuse_another_optimizer(run, recipe)
        context.say(*resume_checks.other_threads(run, context.device))
    return DetectionData(train, val, digest)

"""Refuses flags of detect_main.py that contradict each other, and notes doubtful ones.

`utils.options.refusals` does it for main.py.
"""

import argparse

from utils.options.detection import OF_TRAINING
from utils.options.parser import refuse_idle
from utils.recipes.detection import DetectionRecipe
from utils.system.errors import UserError


def refuse_flags(args: argparse.Namespace, given: set[str], optimizer: str) -> None:
    """Refuses flags that contradict each other, or would do nothing.

    Args:
        args: the flags, with a resumed run's own among them.
        given: names of those that were typed, as `Parser.given` has them.
        optimizer: of the run.

    Raises:
        UserError: one line with the flags.
    """
    if (args.results_json or args.picture) and not args.evaluate:
        raise UserError("--results-json and --picture go with -e: add it, or leave them out")
    refuse_idle(given, OF_TRAINING if args.evaluate else (), "with -e, which does not train")
    refuse_idle(given, ("momentum",) if optimizer == "adamw" else (), "with adamw")
    if args.backbone_weights and args.detector_weights:
        raise UserError(
            "--detector-weights holds a backbone's weights, too: leave --backbone-weights out"
        )
    if args.data is None:
        raise UserError("no DATA given: a folder in COCO's layout, or demo:shapes")


def notes_on(recipe: DetectionRecipe, steps_per_epoch: int) -> list[str]:
    """Returns lines on a recipe that can be meant, but hardly is.

    Args:
        steps_per_epoch: of the run.
    """
    steps = recipe.epochs * steps_per_epoch
    if recipe.warmup_steps <= steps:
        return []
    return [
        f"! the warm-up takes {recipe.warmup_steps:,} steps and the run has {steps:,}: the "
        "learning rate never reaches its full value; give --warmup-steps"
    ]

"""Reads the command line of detect_main.py: flags, the checkpoint, and what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models.detection.detectors import refuse_another_network
from utils.command_line.parser import parser_of, saved_flags, saved_recipe, without_effect
from utils.config.detection import DetectionConfig, DetectionRecipe
from utils.config.flags import flags_of
from utils.data import demo_shapes
from utils.runs import folder as runs
from utils.runs import resume
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import Start
from utils.system.errors import UserError, as_user_error, require
from utils.system.processes import default_workers
from utils.training import detector

FLAGS = flags_of(*DetectionConfig.parts())
EPILOG = (
    "DATA is a folder in COCO's layout (train2017/, val2017/, annotations/instances_*.json), or "
    "demo:shapes."
)


def read_command_line(recipe: DetectionRecipe, description: str) -> tuple[DetectionConfig, Start]:
    """Reads the flags, finds the checkpoint, merges the recipe, and refuses what does not fit.

    Args:
        recipe: the script's default, the paper's.
        description: of the script, for its help.

    Raises:
        UserError: one line with the flag or file, and the remedy.
    """
    typed = parser_of(DetectionConfig.parts(), recipe, description, EPILOG).typed()
    on_demo = typed.get("data") == demo_shapes.SHAPES
    recipe = recipe.override(**demo_shapes.recipe_of(typed.get("arch")) if on_demo else {})
    saved, folder = _find_checkpoint(typed, recipe)
    values: dict[str, Any] = {}
    network_flags = {name: typed.get(name) for name in detector.OF_A_NETWORK}
    if saved is not None:
        with as_user_error(f"{typed['resume']} "):
            refuse_another_network(saved.contents, network_flags)
        if saved.run is not None:
            values = saved_flags(saved.run.flags, FLAGS, typed["resume"])
            recipe = saved_recipe(DetectionRecipe, saved.run.recipe, typed["resume"])
    values |= {name: value for name, value in typed.items() if name not in recipe.as_dict()}
    if values.get("workers") is None:  # the demo's images are so small that processes cost more
        values["workers"] = 0 if values.get("data") == demo_shapes.SHAPES else default_workers()
    recipe = recipe.override(**{k: v for k, v in typed.items() if k in recipe.as_dict()})
    config = DetectionConfig.of(recipe, values, typed)
    refuse_flags(config)
    pretrained = None if saved else detector.read_first_weights(config.network, network_flags)
    if config.network.detector_weights and pretrained is not None:
        first = pretrained.contents
        own: Any = recipe.override(arch=first["arch"], backbone=first["backbone"])
        config = replace(config, recipe=own)  # mypy does not see its type in a generic class
    notes = resume.where(saved, config.run, None)
    return config, Start(saved, pretrained, folder, notes, config.run.seed)


def _find_checkpoint(
    typed: dict[str, Any], recipe: DetectionRecipe
) -> tuple[Checkpoint | None, Path | None]:
    name = None
    if {"data", "arch", "backbone", "action"} & typed.keys():
        own = recipe.override(arch=typed.get("arch"), backbone=typed.get("backbone"))
        name = runs.run_name(own.arch, own.backbone, typed.get("action"))
    evaluates = typed.get("evaluate", False)
    return resume.read_detector(typed.get("resume"), name, typed.get("output"), evaluates)


def refuse_flags(config: DetectionConfig) -> None:
    """Refuses flags that contradict each other, or would do nothing.

    Raises:
        UserError: one line with the flags.
    """
    without_effect(config.typed, config.values(), FLAGS)
    if config.run.log and not config.run.evaluate:
        require((config.run.log,), f"--log {config.run.log}", config.run.log)
    if config.network.backbone_weights and config.network.detector_weights:
        raise UserError(
            "--detector-weights holds a backbone's weights, too: leave --backbone-weights out"
        )
    if config.data.data is None:
        raise UserError("no DATA given: a folder in COCO's layout, or demo:shapes")


def notes_on(recipe: DetectionRecipe, sizes: np.ndarray) -> list[str]:
    """Returns lines on a recipe that can be meant, but hardly is.

    Args:
        sizes: (N, 2) height and width of the training images.
    """
    notes = []
    steps, side = recipe.epochs * (len(sizes) // recipe.batch_size), int(np.median(sizes.min(1)))
    if recipe.warmup_steps > steps:
        notes.append(
            f"! the warm-up takes {recipe.warmup_steps:,} steps and the run has {steps:,}: the "
            "learning rate never reaches its full value; give --warmup-steps"
        )
    if min(recipe.min_size) >= 3 * side:
        notes.append(
            f"! images with a shorter side of {side} pixels are scaled to {min(recipe.min_size)}: "
            f"--min-size {2 * side} takes a fraction of the time and of the memory"
        )
    return notes

"""Defines what the command lines of main.py and detect_main.py share: flags, and saved values."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from utils.options.parser import (
    Parser,
    count,
    non_negative_float,
    number,
    positive_float,
    positive_int,
)
from utils.recipes.classification import Recipe
from utils.recipes.detection import DetectionRecipe
from utils.system.errors import UserError

# Flags of one start of a script: no checkpoint may set them.
OF_ONE_START = frozenset(
    {
        "resume",
        "evaluate",
        "fast",
        "class_names",
        "present_classes",
        "real_labels",
        "pretrained",
        "identity_start",
        "backbone_weights",
        "detector_weights",
        "images_anywhere",
        "output",
        "start_epoch",
        "check_val",
        "device",
        "gpu",
        "data_files",
        "download",
        "results_json",
        "picture",
    }
)
NEVER_TAKEN = OF_ONE_START | {"workers"}  # saved for the record, but a matter of the machine

AnyRecipe = TypeVar("AnyRecipe", Recipe, DetectionRecipe)


def saved_recipe(
    parser: Parser, kind: type[AnyRecipe], values: Mapping[str, Any], source: str
) -> AnyRecipe:
    """Returns the recipe that a checkpoint holds, each field checked as its flag is.

    Raises:
        UserError: a field is missing or is not what its flag takes; names file and field.
    """
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    checked = parser.take_saved(values, (), source)
    empty = {name for name, value in checked.items() if value is None}
    if lacking := sorted(needed - checked.keys() | empty):
        raise UserError(
            f"{source}: the saved recipe lacks {lacking[0]}; give a checkpoint as the scripts "
            "write it"
        )
    if kind is DetectionRecipe:
        factor, settings = values.get("warmup_factor", 1 / 3), values.get("settings", {})
        if not isinstance(factor, float) or not 0 < factor <= 1 or not isinstance(settings, dict):
            raise UserError(
                f"{source}: the saved recipe's warmup_factor or settings cannot be used; give a "
                "checkpoint as the scripts write it"
            )
        checked |= {"warmup_factor": factor, "settings": settings}
    return kind.from_dict(checked)


def add_data_flag(group: argparse._ArgumentGroup) -> None:
    """Adds DATA."""
    group.add_argument(
        "data", metavar="DATA", nargs="?", help="data folder (when resuming: the run's own)"
    )


def add_original_files(group: argparse._ArgumentGroup) -> None:
    """Adds --data-files and --download."""
    group.add_argument(
        "--data-files",
        metavar="DIR",
        help="the original files of demo:fashion, demo:cifar10 or demo:cifar100 (default: where "
        "the system's package has them)",
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="let torchvision fetch the original files",
    )


def add_workers(group: argparse._ArgumentGroup, demos: str) -> None:
    """Adds -j; `demos` says what has no worker by default."""
    group.add_argument(
        "-j",
        "--workers",
        type=count,
        metavar="N",
        help=f"loader processes of each rank (default: 4, or what the machine has; {demos}: 0)",
    )


def add_check_val(group: argparse._ArgumentGroup) -> None:
    """Adds --check-val."""
    group.add_argument(
        "--check-val",
        action="store_true",
        help="read every validation image before training, and stop at a broken one (default: in "
        "the background of the first epoch)",
    )


def add_worker_timeout(group: argparse._ArgumentGroup) -> None:
    """Adds --worker-timeout."""
    group.add_argument(
        "--worker-timeout",
        type=non_negative_float,
        default=600,
        metavar="S",
        help="seconds without a batch after which loader workers count as hung (default: 600)",
    )


def add_sgd(group: argparse._ArgumentGroup, recipe: Recipe | DetectionRecipe) -> None:
    """Adds momentum and weight decay, with the recipe's values in their help."""
    group.add_argument(
        "--momentum",
        type=number(float, 0, 1, below=True),
        metavar="F",
        help=f"default: {recipe.momentum}",
    )
    group.add_argument(
        "--wd",
        "--weight-decay",
        dest="weight_decay",
        type=non_negative_float,
        metavar="F",
        help=f"default: {recipe.weight_decay}",
    )


def add_fused(group: argparse._ArgumentGroup) -> None:
    """Adds --fused."""
    group.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run BatchNorm, ECA, addition and ReLU as one operation (default: yes)",
    )


def add_resume(group: argparse._ArgumentGroup) -> None:
    """Adds --resume."""
    group.add_argument(
        "--resume",
        metavar="CKPT",
        help="go on from this checkpoint with its run's own settings; auto: the newest good one "
        "of --output or of the newest run",
    )


def add_run_flags(
    group: argparse._ArgumentGroup, folder: Sequence[str], seed: tuple[Any, str]
) -> None:
    """Adds the flags of a run's folder, its checkpoints, its seed and its device.

    Args:
        folder: the words that make a folder's name, for the help.
        seed: type and help of --seed.
    """
    group.add_argument(
        "--output",
        metavar="DIR",
        help=f"run folder (default: runs/{'_'.join(folder)}[_ACTION]-N, a new one); with -e a new "
        "folder for the figures, but with -e --resume auto that of the run, and nothing is written",
    )
    group.add_argument("--action", metavar="TEXT", help="a word for the run folder's name")
    group.add_argument(
        "-p",
        "--print-freq",
        type=positive_int,
        default=10,
        metavar="N",
        help="steps between two lines of progress (default: 10)",
    )
    group.add_argument(
        "--save-every",
        type=positive_int,
        metavar="STEPS",
        help="checkpoint inside the epoch, too (default: at its end)",
    )
    group.add_argument(
        "--save-minutes", type=positive_float, metavar="M", help="the same, by the clock"
    )
    kind, words = seed
    group.add_argument("--seed", type=kind, metavar="N", help=words)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--gpu", type=count, metavar="N", help="use this GPU alone")

"""Defines the flags of main.py and light_main.py."""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from functools import partial

from utils.data.decoding import DECODERS, ON_DEVICE, decoder_name
from utils.data.demo_sets import DEMOS
from utils.options.common import (
    add_check_val,
    add_data_flag,
    add_fused,
    add_original_files,
    add_resume,
    add_run_flags,
    add_sgd,
    add_worker_timeout,
    add_workers,
)
from utils.options.evaluation import add_evaluation_flags
from utils.options.modern_parts import augmentation_flags, regularisation_flags
from utils.options.own_data import class_flags, small_data_flags
from utils.options.parser import (
    Parser,
    count,
    fraction,
    non_negative_float,
    number,
    positive_float,
    positive_int,
)
from utils.options.recipe_file import recipe_name
from utils.recipes.classification import OPTIMIZERS, PAPER, RECIPES, Recipe
from utils.recipes.schedules import SCHEDULES
from utils.system.text import did_you_mean

OF_TRAINING = {
    "check_val",
    "skip_bad_images",
    "grad_checkpointing",
    "class_weights",
    "start_epoch",
    "identity_start",
    "save_every",
    "save_minutes",
    "seed",
    *({f.name for f in fields(Recipe)} - {"arch", "batch_size", "img_size", "crop_pct"}),
}
FIRST = (  # what `-h` shows; `-h all` shows every flag
    "data",
    "arch",
    "pretrained",
    "recipe",
    "epochs",
    "batch_size",
    "lr",
    "workers",
    "amp",
    "evaluate",
    "resume",
    "output",
    "device",
    "seed",
)
OF_BLOCKS = {"no_fused", "channels_last"}
OF_EVALUATION = {"present_classes", "class_names", "real_labels"}


def build_parser(recipe: Recipe, networks: Iterable[str], description: str) -> Parser:
    """Returns the parser; a recipe's flags default to None, so that one given is known.

    Args:
        recipe: shown as the defaults in the help.
        networks: the known names for --arch.
    """
    parser = Parser(
        first=FIRST,
        description=description,
        epilog="DATA is a folder with train/ and val/, each of one folder per class or of tar "
        f"shards (docs/SCALING.md), the URL of such shards, or one of {DEMOS}.",
    )
    _data_flags(parser.add_argument_group("data"), recipe)
    _network_flags(parser.add_argument_group("network"), recipe, list(networks))
    optimisation = parser.add_argument_group("optimisation")
    _optimisation_flags(optimisation, recipe)
    _schedule_flags(optimisation, recipe)
    _speed_flags(optimisation)
    modern = parser.add_argument_group("parts of the modern recipes, off in the paper's")
    augmentation_flags(modern)
    regularisation_flags(modern)
    own = parser.add_argument_group("data of one's own: few images, uneven classes")
    small_data_flags(own)
    class_flags(own)
    _run_flags(parser.add_argument_group("run"))
    return parser


def _data_flags(group, recipe: Recipe) -> None:
    add_data_flag(group)
    add_original_files(group)
    add_workers(group, "demos")
    group.add_argument(
        "--img-size", type=positive_int, metavar="S", help=f"pixels (default: {recipe.img_size})"
    )
    group.add_argument(
        "--crop-pct",
        type=number(float, 0, 1, above=True),
        metavar="F",
        help=f"evaluation: share of the resized image that is kept (default: {recipe.crop_pct})",
    )
    group.add_argument(
        "--min-scale",
        type=number(float, 0, 1, above=True),
        metavar="F",
        help=f"training: smallest crop, as a share of the area (default: {recipe.min_scale})",
    )
    group.add_argument(
        "--hflip",
        type=fraction,
        metavar="P",
        help=f"training: probability of a mirrored image (default: {recipe.hflip})",
    )
    group.add_argument(
        "--decoder",
        type=partial(decoder_name, known=(*DECODERS, ON_DEVICE)),
        default="torchvision",
        metavar="NAME",
        help="torchvision; simplejpeg, if installed, reads the same pixels quicker; pil reads and "
        "resizes exactly as published evaluations did, more slowly; cuda decodes, crops and flips "
        "on the run's GPU, to slightly other pixels (docs/PERFORMANCE.md)",
    )
    group.add_argument(
        "--skip-bad-images",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="training: replace images that cannot be read, and list them at the end",
    )
    add_check_val(group)
    add_worker_timeout(group)


def _network_flags(group, recipe: Recipe, networks: list[str]) -> None:
    def known(name: str) -> str:
        if name not in networks:
            hint = did_you_mean(name, networks) or f"; known: {', '.join(networks)}"
            raise argparse.ArgumentTypeError(f"no network {name!r}{hint}")
        return name

    group.add_argument(
        "-a", "--arch", type=known, metavar="NAME", help=f"network (default: {recipe.arch})"
    )
    group.add_argument(
        "--ksize",
        metavar="K",
        help="kernel sizes: 3557, 3,5,5,11, adaptive, or 13 for MobileNetV2 (default: published)",
    )
    group.add_argument(
        "--attention",
        metavar="NAME",
        help="another attention in the same network, as in the paper's ablation: eca_ns, se_var1, "
        "se_var2, se_var3, … (default: what the network's name says)",
    )
    group.add_argument(
        "--num-classes", type=positive_int, metavar="N", help="default: read from the data"
    )
    group.add_argument("--pretrained", metavar="CKPT", help="start from these weights")
    group.add_argument(
        "--identity-start",
        action="store_true",
        help="new ECA layers begin without effect: the network starts as the plain one of "
        "--pretrained",
    )


def _optimisation_flags(group, recipe: Recipe) -> None:
    group.add_argument(
        "--recipe",
        type=recipe_name,
        metavar="NAME",
        help=f"{', '.join(RECIPES)}, or a .json file such as a run's args.json: values for the "
        f"flags below and --crop-pct, where none is given (default: {PAPER}, whose numbers stand "
        "here); a demo keeps its sizes and schedule under a name; see docs/RECIPES.md",
    )
    group.add_argument("--epochs", type=positive_int, metavar="N", help=f"default: {recipe.epochs}")
    group.add_argument(
        "--start-epoch",
        type=count,
        metavar="N",
        help="begin after this many epochs (default: 0, or where the resumed run stopped; going "
        "back makes a new folder)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=positive_int,
        metavar="N",
        help=f"global batch, over all devices (default: {recipe.batch_size})",
    )
    group.add_argument(
        "--lr", "--learning-rate", type=positive_float, metavar="F", help=f"default: {recipe.lr}"
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help=f"lamb is timm's, if installed; adamw and lamb want another --lr (default: "
        f"{recipe.optimizer})",
    )
    add_sgd(group, recipe)


def _schedule_flags(group, recipe: Recipe) -> None:
    group.add_argument("--schedule", choices=SCHEDULES, help=f"default: {recipe.schedule}")
    group.add_argument(
        "--lr-step",
        type=positive_int,
        metavar="N",
        help=f"schedule step: epochs between two decays (default: {recipe.lr_step})",
    )
    group.add_argument(
        "--lr-decay",
        type=number(float, 0, 1, above=True),
        metavar="F",
        help=f"schedules step and exp: factor of a decay (default: {recipe.lr_decay})",
    )
    group.add_argument(
        "--warmup-epochs",
        type=non_negative_float,
        metavar="F",
        help=f"linear rise of the learning rate (default: {recipe.warmup_epochs:g})",
    )


def _speed_flags(group) -> None:
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="automatic mixed precision (default: off)",
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="NHWC memory format (default: no)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the network (default: no)",
    )
    group.add_argument(
        "--grad-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep each block's input alone for backward and compute the rest again: less memory, "
        "more time, the same results (default: no)",
    )
    add_fused(group)


def _run_flags(group) -> None:
    add_evaluation_flags(group)
    add_resume(group)
    words = "repeatable run: bit for bit on the CPU; on CUDA with deterministic kernels, slower"
    add_run_flags(group, ("ARCH",), (number(int, 0, 2**63 - 1), words))

"""Defines the flags of detect_main.py."""

import argparse
from collections.abc import Iterable, Sequence

from utils.options.common import (
    add_check_val,
    add_data_flag,
    add_fused,
    add_resume,
    add_run_flags,
    add_sgd,
    add_worker_timeout,
    add_workers,
)
from utils.options.parser import (
    Parser,
    count,
    fraction,
    number,
    positive_float,
    positive_int,
)
from utils.recipes.detection import AUTO, OPTIMIZERS, DetectionRecipe
from utils.system.text import did_you_mean

OF_TRAINING = {
    "check_val",
    "train_images",
    "train_annotations",
    "drop_empty",
    "hflip",
    "backbone_weights",
    "detector_weights",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "lr_steps",
    "lr_decay",
    "warmup_steps",
    "clip",
    "save_every",
    "save_minutes",
    "seed",
}


FIRST = (  # what `-h` shows; `-h all` shows every flag
    "data",
    "arch",
    "backbone",
    "backbone_weights",
    "epochs",
    "batch_size",
    "lr",
    "workers",
    "amp",
    "evaluate",
    "resume",
    "picture",
    "output",
    "device",
    "seed",
)


def build_parser(
    recipe: DetectionRecipe,
    detectors: Sequence[str],
    backbones: Iterable[str],
    norms: Sequence[str],
    description: str,
) -> Parser:
    """Returns the parser; a recipe's flags default to None, so that one given is known."""
    parser = Parser(
        first=FIRST,
        description=description,
        epilog="DATA is a folder in COCO's layout (train2017/, val2017/, "
        "annotations/instances_*.json), or demo:shapes.",
    )
    _data_flags(parser.add_argument_group("data"), recipe)
    _network_flags(parser.add_argument_group("network"), recipe, detectors, list(backbones), norms)
    _optimisation_flags(parser.add_argument_group("optimisation"), recipe)
    _run_flags(parser.add_argument_group("run"))
    return parser


def _data_flags(group, recipe: DetectionRecipe) -> None:
    add_data_flag(group)
    for part in ("train", "val"):
        group.add_argument(
            f"--{part}-images", metavar="DIR", help=f"in DATA, instead of {part}2017"
        )
        group.add_argument(
            f"--{part}-annotations",
            metavar="FILE",
            help=f"in DATA, instead of annotations/instances_{part}2017.json",
        )
    group.add_argument(
        "--drop-empty",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave images without objects out of training (default: they train as background)",
    )
    group.add_argument(
        "--images-anywhere",
        action="store_true",
        help="images may lie outside of their folder: links, '..' and absolute names in the "
        "annotations are followed (default: refused)",
    )
    add_workers(group, "demo")
    group.add_argument(
        "--min-size",
        type=positive_int,
        metavar="S",
        help=f"pixels of an image's shorter side (default: {recipe.min_size})",
    )
    group.add_argument(
        "--max-size",
        type=positive_int,
        metavar="S",
        help=f"most pixels of the longer side (default: {recipe.max_size})",
    )
    group.add_argument(
        "--hflip",
        type=fraction,
        metavar="P",
        help=f"training: probability of a mirrored image (default: {recipe.hflip})",
    )
    add_check_val(group)
    add_worker_timeout(group)


def _network_flags(
    group,
    recipe: DetectionRecipe,
    detectors: Sequence[str],
    backbones: list[str],
    norms: Sequence[str],
) -> None:
    def known(name: str) -> str:
        if name not in backbones:
            hint = did_you_mean(name, backbones) or f"; known: {', '.join(backbones)}"
            raise argparse.ArgumentTypeError(f"no backbone {name!r}{hint}")
        return name

    group.add_argument("-a", "--arch", choices=detectors, help=f"detector (default: {recipe.arch})")
    group.add_argument(
        "-b",
        "--backbone",
        type=known,
        metavar="NAME",
        help=f"a ResNet of this project (default: {recipe.backbone})",
    )
    group.add_argument(
        "--ksize",
        metavar="K",
        help="ECA's kernel sizes: 3377, 3,5,5,11 or adaptive (default: the published ones)",
    )
    group.add_argument(
        "--backbone-weights",
        metavar="CKPT",
        help="start from a checkpoint of main.py, or a released one",
    )
    group.add_argument(
        "--detector-weights",
        metavar="CKPT",
        help="start from a detector of this program, also one of other classes: the layers with an "
        "output for each class are new then",
    )
    group.add_argument(
        "--norm",
        choices=norms,
        help="BatchNorm of the backbone: eval (statistics fixed, affine trained), frozen (both "
        "fixed), bn, sync (default: eval with weights to start from, else bn)",
    )
    group.add_argument(
        "--trainable-layers",
        type=number(int, 0, 5),
        metavar="N",
        help="0 to 5: 3 trains layer2 to layer4 (default: 3 with weights to start from, else 5)",
    )
    group.add_argument(
        "--legacy",
        action="store_true",
        help="mmdetection v1's geometry (imported checkpoints bring it along)",
    )


def learning_rate(text: str) -> float | str:
    """Checks --lr, as an argparse type: a number, or "auto"."""
    return text if text == AUTO else positive_float(text)


def _optimisation_flags(group, recipe: DetectionRecipe) -> None:
    group.add_argument("--epochs", type=positive_int, metavar="N", help=f"default: {recipe.epochs}")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help=f"global batch, over all devices (default: {recipe.batch_size})",
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help=f"adamw learns quicker without pretrained weights (default: {recipe.optimizer})",
    )
    group.add_argument(
        "--lr",
        type=learning_rate,
        metavar="F",
        help="default: auto, which is 0.01 for each 8 images of a batch",
    )
    add_sgd(group, recipe)
    group.add_argument(
        "--lr-steps",
        type=positive_int,
        nargs="+",
        metavar="N",
        help=f"epochs after which the rate decays (default: {' '.join(map(str, recipe.lr_steps))})",
    )
    group.add_argument(
        "--lr-decay",
        type=number(float, 0, 1, above=True),
        metavar="F",
        help=f"factor of a decay (default: {recipe.lr_decay})",
    )
    group.add_argument(
        "--warmup-steps",
        type=count,
        metavar="N",
        help=f"rise of the rate from {recipe.warmup_factor:.2g} of it (default: "
        f"{recipe.warmup_steps})",
    )
    group.add_argument(
        "--clip",
        type=positive_float,
        metavar="F",
        help=f"largest gradient norm (default: {recipe.clip:g})",
    )
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="automatic mixed precision; the heads' outputs stay float32 (default: off)",
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="NHWC memory format (default: on the CPU, where it is several times quicker)",
    )
    add_fused(group)


def _run_flags(group) -> None:
    group.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help="evaluate the checkpoint of --resume, and do not train: prints COCO's figures, and "
        "writes what --output, --results-json and --picture ask for",
    )
    add_resume(group)
    group.add_argument(
        "--results-json",
        metavar="FILE",
        help="with -e: write the detections in COCO's result format",
    )
    group.add_argument(
        "--picture",
        metavar="FILE",
        help="with -e: draw detections beside the ground truth of some images",
    )
    words = "repeatable run: bit for bit on the CPU; on CUDA as far as its kernels allow"
    add_run_flags(group, ("ARCH", "BACKBONE"), (count, words))

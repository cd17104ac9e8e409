"""The flags of main.py for the parts of the modern recipes, which are off in the paper's."""

import argparse

from utils.data.rand_augment import EXAMPLE, parse_rand_augment
from utils.data.transforms import AUTO_AUGMENTS
from utils.options.parser import count, fraction, non_negative_float, number, positive_int
from utils.recipes.classification import LOSSES


def augmentation_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of what changes training images and their targets."""
    group.add_argument(
        "--label-smoothing",
        type=number(float, 0, 1, below=True),
        metavar="F",
        help="share of each target that is spread over all classes",
    )
    group.add_argument(
        "--mixup",
        type=non_negative_float,
        metavar="ALPHA",
        help="blend pairs of images; their shares are drawn from Beta(ALPHA, ALPHA)",
    )
    group.add_argument(
        "--cutmix",
        type=non_negative_float,
        metavar="ALPHA",
        help="paste a rectangle of one image into another; with --mixup, one of them per batch",
    )
    group.add_argument(
        "--auto-augment",
        type=_auto_augment,
        metavar="NAME",
        help="trivial or rand, torchvision's TrivialAugment or RandAugment; or timm's RandAugment "
        f"of magnitude m and its deviation, such as {EXAMPLE}",
    )
    group.add_argument(
        "--random-erasing",
        type=fraction,
        metavar="P",
        help="probability of a rectangle in the mean colour",
    )
    group.add_argument(
        "--train-size",
        type=count,
        metavar="S",
        help="pixels of training images (0: --img-size, which is then evaluation's alone)",
    )
    group.add_argument(
        "--repeats",
        type=positive_int,
        metavar="N",
        help="repeated augmentation: each image of a batch N times, an epoch as long as ever",
    )


def _auto_augment(text: str) -> str:
    if text not in AUTO_AUGMENTS and parse_rand_augment(text) is None:
        known = ", ".join(AUTO_AUGMENTS)
        raise argparse.ArgumentTypeError(
            f"no augmentation {text!r}; known: {known}, or timm's, such as {EXAMPLE} (m at most 10)"
        )
    return text


def regularisation_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of loss, stochastic depth, averaged weights, weight decay, gradients and
    BatchNorm.
    """
    group.add_argument(
        "--bce", dest="loss", action="store_const", const="bce", help="the same as --loss bce"
    )
    group.add_argument(
        "--loss",
        choices=LOSSES,
        help="ce: cross-entropy; bce: binary cross-entropy, each class by itself",
    )
    group.add_argument(
        "--bce-threshold",
        type=number(float, 0, 1, below=True),
        metavar="F",
        help="loss bce: shares of mixed or smoothed targets above F count as 1, others as 0 (0: "
        "shares as they are)",
    )
    group.add_argument(
        "--drop-path",
        type=number(float, 0, 1, below=True),
        metavar="P",
        help="stochastic depth: images skip blocks, the first never, the last with probability P",
    )
    group.add_argument(
        "--ema",
        type=number(float, 0, 1, below=True),
        metavar="DECAY",
        help="evaluate and save averaged weights; decay per step, lower in the first steps",
    )
    group.add_argument(
        "--norm-decay",
        action=argparse.BooleanOptionalAction,
        help="weight decay on norms, biases and ECA kernels, too (the paper: yes)",
    )
    group.add_argument(
        "--clip-grad", type=non_negative_float, metavar="NORM", help="the gradient's largest norm"
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        metavar="N",
        help="take each batch in N parts, for less memory",
    )
    group.add_argument(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        help="BatchNorm over all processes' images (torchrun on GPUs)",
    )

"""The flags of main.py for the parts of the modern recipes, which are off in the paper's."""

import argparse

from utils.data.transforms import AUTO_AUGMENTS
from utils.options.parser import count, fraction, non_negative_float, number, positive_int


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
        "--auto-augment", choices=AUTO_AUGMENTS, help="torchvision's TrivialAugment or RandAugment"
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


def regularisation_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of averaged weights, weight decay, gradients and BatchNorm."""
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

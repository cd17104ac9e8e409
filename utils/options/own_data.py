"""The flags of main.py for data of one's own: few images, or classes of uneven size."""

import argparse
import re

from utils.data.sampler import SAMPLERS
from utils.options.parser import count, number


def small_data_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for few images."""
    group.add_argument(
        "--freeze",
        type=_frozen,
        metavar="PART",
        help="do not train the first layers, and leave their BatchNorm as it is: backbone, all but "
        "the last layer; or stages:N, the stem and the first N stages (default: none)",
    )
    group.add_argument(
        "--layer-decay",
        type=number(float, 0, 1, above=True),
        metavar="F",
        help="multiply the learning rate by F from each block to the one before it (default: 1)",
    )
    group.add_argument(
        "--early-stop",
        type=count,
        metavar="N",
        help="end after N epochs without a better top-1 (default: 0, never)",
    )


def _frozen(text: str) -> str:
    if not re.fullmatch(r"none|backbone|stages:\d{1,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not none, backbone or stages:N")
    return text


def class_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for classes of uneven size."""
    group.add_argument(
        "--class-weights",
        metavar="FILE",
        help="weigh each image's loss by its class: balanced (images / (classes * images of the "
        "class)), or a CSV or JSON file of class names and weights (docs/FINE_TUNING.md)",
    )
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="images of an epoch: shuffle, each once (the default), or balanced, each class alike",
    )

"""The flags of main.py for data of one's own: few images, or classes of uneven size."""

import argparse

from utils.data.sampler import SAMPLERS
from utils.options.parser import count


def small_data_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for few images."""
    group.add_argument(
        "--early-stop",
        type=count,
        metavar="N",
        help="end after N epochs without a better top-1 (default: 0, never)",
    )


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

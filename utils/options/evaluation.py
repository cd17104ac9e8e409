"""The flags of main.py for an evaluation: what is judged, how, and what is written of it."""

import argparse


def add_evaluation_flags(group: argparse._ArgumentGroup) -> None:
    """Adds -e, --fast and --report, and what other sets than the training's need."""
    group.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help="evaluate the checkpoint of --resume, and do not train: prints loss, top-1 and top-5; "
        "with --output DIR it writes them to DIR/evaluation.json, too",
    )
    group.add_argument(
        "--fast",
        action="store_true",
        help="with -e: BatchNorm folded, ECA's gate before the last convolution, --amp as weights",
    )
    group.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write figures by class, confusions, calibration and the worst images to a folder "
        "report/: with -e of this evaluation, in --output or beside the run's checkpoint; else of "
        "the best epoch, after the last one (docs/REPORTS.md)",
    )
    _add_other_sets(group)


def _add_other_sets(group: argparse._ArgumentGroup) -> None:
    """Adds what evaluation on other sets than the training's needs (docs/ROBUSTNESS.md)."""
    group.add_argument(
        "--present-classes",
        action="store_true",
        help="with -e: compare only the outputs of classes that DATA has, as published for "
        "ImageNet-A and ImageNet-R",
    )
    group.add_argument(
        "--class-names",
        metavar="FILE",
        help="with -e and weights without class names: the folder name of each output, one a line; "
        "or the folder of the training's classes, such as ImageNet's val",
    )
    group.add_argument(
        "--real-labels",
        metavar="FILE",
        help="with -e on ImageNet's validation images: accuracy by the ReaL labels, too, of their "
        "published real.json",
    )

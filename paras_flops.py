#!/usr/bin/env python3
"""Parameters and FLOPs of the networks, each by a named counting convention.

Examples:
    python paras_flops.py -a eca_mobilenetv2             one network
    python paras_flops.py -a eca_resnet50 --per-layer    and each of its layers
    python paras_flops.py --all                          all, beside the published figures
    python paras_flops.py -a mask_rcnn -b eca_resnet50   a detector on that backbone
    python paras_flops.py --all --detectors              the detectors of the published table
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import argparse
import functools
import json
import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from models import MODELS, create_model
from models.attention import typed_attention
from models.registry import check_name, image_settings, is_of_library
from utils.command_line.parser import Parser
from utils.config.classification import ClassificationRun, NetworkSettings
from utils.config.flags import flags_of, number
from utils.inspection import cost_tables as tables
from utils.inspection import published
from utils.inspection.cost import Cost, count_cost
from utils.system.errors import UserError, as_user_error
from utils.system.faults import run_script
from utils.system.text import did_you_mean, paragraphs

DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet")
PIXELS = number(int, 1, 8192)


# fmt: off
def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("-a", "--arch", metavar="NAME",
        help=f"one of {', '.join([*networks(), *DETECTORS])}; timm:NAME or torchvision:NAME")
    add("--all", action="store_true", help="a table, one line per network")
    add("--detectors", action="store_true", help="with --all: detectors instead of classifiers")
    add("-b", "--backbone", metavar="NAME", help="a detector's ResNet (default: eca_resnet50)")
    add("--ksize", metavar="K",
        help="ECA's kernel sizes: 3557, 3,5,5,11 or adaptive; 13 for MobileNetV2"
        " (default: those of the released weights)")
    add("--img-size", type=image_size, metavar="PIXELS",
        help="side of the image, or height and width as in 320x480"
        f" (default: {tables.size_text(published.IMAGENET_SIZE)};"
        f" detectors: {tables.size_text(published.COCO_SIZE)})")
    add("--num-classes", type=number(int, 1, 10_000_000), metavar="N",
        help="outputs of the last layer (default: 1000; detectors: COCO's, 81 with background,"
        " 80 for retinanet)")
    flags_of(NetworkSettings)["attention"].add_to(parser, "attention", None)
    flags_of(ClassificationRun)["list_models"].add_to(parser, "list_models", None)
    add("--per-layer", action="store_true", help="list every layer (with -a)")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser
# fmt: on


def image_size(text: str) -> tuple[int, int]:
    """Parses a size, as an argparse type: 224 → (224, 224), 800x1280 → (800, 1280)."""
    height, x, width = text.partition("x")
    if x and not (height and width):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 224 or 800x1280")
    return PIXELS(height), PIXELS(width if x else height)


def networks() -> list[str]:
    """Returns the classification networks, each once: another spelling shares its constructor."""
    first_name = {create: name for name, create in reversed(MODELS.items())}
    return list(first_name.values())[::-1]


def check_flags(flags: argparse.Namespace) -> None:
    if flags.all and flags.arch:
        raise UserError("-a NAME and --all exclude each other: leave one of them out")
    if flags.detectors and not flags.all:
        raise UserError("--detectors goes with --all: give both, or -a NAME for one detector")
    if not (flags.all or flags.arch):
        raise UserError("give a network, such as -a eca_resnet50, or --all for a table")
    single = [("--ksize", flags.ksize), ("--per-layer", flags.per_layer), ("-b", flags.backbone)]
    single += [("--attention", "attention" in flags)]
    for flag, value in single:
        if flags.all and value:
            raise UserError(f"{flag} is for one network: give -a NAME instead of --all")
    known = [*MODELS, *DETECTORS]
    if flags.arch and is_of_library(flags.arch):
        with as_user_error():
            check_name(flags.arch)
    elif flags.arch and flags.arch not in known:
        hint = did_you_mean(flags.arch, known) or f": use one of {', '.join(known)}"
        raise UserError(f"unknown network {flags.arch!r}{hint}")
    if flags.backbone and flags.arch not in DETECTORS:
        raise UserError(f"-b is for a detector: {', '.join(DETECTORS)}")
    if flags.per_layer and flags.arch in DETECTORS:
        raise UserError("--per-layer is for a classification network: give a detector without it")


def build(create: Callable[..., nn.Module], *settings: object, **more: object) -> nn.Module:
    """Returns the network on `meta`, without memory: counting needs shapes only."""
    with as_user_error(), torch.device("meta"):
        return create(*settings, **more)


def count(
    arch: str, backbone: str | None, size: tuple[int, int], flags: argparse.Namespace
) -> tables.Report:
    """Counts a classifier, or a detector on a backbone."""
    kind = {}
    if "attention" in flags:
        with as_user_error():
            kind["attention"] = typed_attention(flags.attention)
    if arch not in DETECTORS:
        classes = flags.num_classes or 1000
        network = build(create_model, arch, flags.ksize, classes, **kind)
        return tables.classifier_report(
            network, size, plain_cost(tables.plain_name(network.arch), classes, size)
        )
    from models.detection.detectors import FIRST_LABEL, create_detector  # torchvision, only here

    network = build(create_detector, arch, backbone, flags.ksize, flags.num_classes, **kind)
    plain = build(create_detector, arch, backbone, None, flags.num_classes, attention="none")
    return tables.detector_report(network, size, plain, FIRST_LABEL[arch])


@functools.cache
def plain_cost(arch: str, num_classes: int, size: tuple[int, int]) -> Cost:
    """Counts a network without attention, once for all that have one."""
    return count_cost(build(create_model, arch, None, num_classes), (1, 3, *size))


def main() -> None:
    flags = build_parser().parse_args()
    if "list_models" in flags:
        print(tables.list_text(flags.list_models))
        return
    check_flags(flags)
    detection = flags.detectors or flags.arch in DETECTORS
    size = flags.img_size or (published.COCO_SIZE if detection else published.IMAGENET_SIZE)
    if flags.img_size is None and flags.arch and is_of_library(flags.arch):
        with as_user_error():
            size = (image_settings(flags.arch)["img_size"],) * 2
    if flags.all:
        targets = list(published.COCO) if detection else [(name, None) for name in networks()]
    else:
        targets = [(flags.arch, flags.backbone or "eca_resnet50")]

    silent = not (flags.all and sys.stderr.isatty())
    bar = tqdm(targets, "counting", leave=False, disable=silent)
    reports = [count(arch, backbone, size, flags) for arch, backbone in bar]
    print(text_of(reports, detection, flags))


def text_of(reports: list[tables.Report], detection: bool, flags: argparse.Namespace) -> str:
    """Returns what is printed of the reports."""
    if flags.json:
        if not flags.per_layer:
            reports = [{k: v for k, v in report.items() if k != "layers"} for report in reports]
        return json.dumps(reports if flags.all else reports[0], indent=2)
    if flags.all:
        return (
            tables.detection_table(reports) if detection else tables.classification_table(reports)
        )
    if detection:
        return tables.detector_table(reports[0])
    layers = tables.layer_table(reports[0]) if flags.per_layer else ""
    return paragraphs(layers, tables.network_table(reports[0]))


if __name__ == "__main__":
    run_script(main)

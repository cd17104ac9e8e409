#!/usr/bin/env python3
"""Parameters and FLOPs of the networks, each by a named counting convention.

Usage:
    python paras_flops.py -a eca_mobilenetv2           one network
    python paras_flops.py -a eca_resnet50 --per-layer  and each of its layers
    python paras_flops.py --all                        every network beside its published figures
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from models import MODELS, create_model
from models.attention import (
    ECALayer,
    ECANSLayer,
    SELayer,
    SEVar1Layer,
    SEVar2Layer,
    SEVar3Layer,
)
from utils import published
from utils.cli import Parser, number, run_script
from utils.counting import (
    CONVENTIONS,
    Cost,
    count_cost,
    format_flops,
    format_params,
    thop_version,
    titles,
)
from utils.errors import UserError

ATTENTION_LAYERS = (ECALayer, ECANSLayer, SELayer, SEVar1Layer, SEVar2Layer, SEVar3Layer)


@dataclass
class Report:
    """One network counted, and what was printed of it."""

    network: str
    ksize: tuple[int, ...] | None
    num_classes: int
    img_size: int
    cost: Cost
    attention: Cost  # the share of the attention layers, without their sigmoid and product
    published: published.Published | None  # None: nothing for these settings

    @property
    def params(self) -> str:
        return format_params(self.cost.params)

    @property
    def flops(self) -> str:
        return format_flops(self.cost.mid_2019)

    @property
    def agrees(self) -> bool | None:
        """Whether our figures, rounded, are the published ones; None where there are none."""
        if self.published is None:
            return None
        return self.published.params == self.params and self.published.flops in (None, self.flops)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-a", "--arch", metavar="NAME", help=f"one of {', '.join(networks())}")
    what.add_argument("--all", action="store_true", help="every network, one line each")
    parser.add_argument(
        "--ksize",
        metavar="K",
        help="ECA's kernel sizes: 3557, 3,5,5,11 or adaptive; 13 for MobileNetV2"
        " (default: those of the released weights)",
    )
    parser.add_argument(
        "--img-size",
        type=number(int, 1, 8192),
        default=224,
        metavar="PIXELS",
        help="height and width of the input (default: 224)",
    )
    parser.add_argument(
        "--num-classes",
        type=number(int, 1, 10_000_000),
        default=1000,
        metavar="N",
        help="outputs of the last layer (default: 1000)",
    )
    parser.add_argument("--per-layer", action="store_true", help="list every layer (with -a)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def networks() -> list[str]:
    """The networks' names, each network once: another spelling shares its constructor."""
    first_name = {build: name for name, build in reversed(MODELS.items())}
    return list(first_name.values())[::-1]


def count(arch: str, ksize: str | None, num_classes: int, img_size: int) -> Report:
    try:
        with torch.device("meta"):  # counting needs shapes, not memory
            network = create_model(arch, ksize=ksize, num_classes=num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error
    cost = count_cost(network, (1, 3, img_size, img_size))
    printed = published.IMAGENET.get(network.arch)
    if printed and (printed.ksize, 1000, 224) != (network.ksize, num_classes, img_size):
        printed = None
    return Report(
        network=network.arch,
        ksize=network.ksize,
        num_classes=num_classes,
        img_size=img_size,
        cost=cost,
        attention=cost.share(network, ATTENTION_LAYERS),
        published=printed,
    )


def ksize_text(ksize: tuple[int, ...] | None) -> str:
    if ksize is None:
        return "-"
    return ("" if max(ksize) < 10 else ",").join(map(str, ksize))


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def print_columns(rows: list[list[str]], left: int = 1) -> None:
    """Prints aligned columns, the first `left` of them flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_legend(entries: Sequence[tuple[str, str]]) -> None:
    width = max(len(title) for title, _ in entries)
    for title, text in entries:
        lines = textwrap.wrap(text, 110 - width)
        for i, line in enumerate(lines):
            print(f"{'' if i else title:{width}}  {line}")


def conventions_legend() -> list[tuple[str, str]]:
    return [(title, text) for title, (_, text) in zip(titles(), CONVENTIONS.values(), strict=True)]


def counts(cost: Cost) -> list[str]:
    """A cost by each of the conventions."""
    return [f"{n:,}" for n in (cost.mid_2019_printed, cost.thop_today, cost.multiply_adds)]


def disagreement(report: Report) -> str:
    """What was published and what we count; an empty string where they agree."""
    printed = report.published
    if report.agrees in (True, None):
        return ""
    both = [
        f"published {theirs} {what}, counted {ours} ({exact:,})"
        for what, theirs, ours, exact in (
            ("parameters", printed.params, report.params, report.cost.params),
            ("FLOPs", printed.flops, report.flops, report.cost.mid_2019_printed),
        )
        if theirs not in (None, ours)
    ]
    return f"{report.network}: {'; '.join(both)}: {printed.remark}"


def print_all(reports: list[Report]) -> None:
    size, num_classes = reports[0].img_size, reports[0].num_classes
    print(f"One image of 3x{size}x{size}, {num_classes} classes.\n")
    rows = [
        ["", "", "published", "", "counted", "", "", "parameters", "", "FLOPs", "", ""],
        ["network", "ksize", "params", "FLOPs", "params", "FLOPs", "agree", "all", "attention"],
    ]
    rows[1] += titles()
    for report in reports:
        printed = report.published
        rows.append(
            [
                report.network,
                ksize_text(report.ksize),
                printed.params if printed else "-",
                (printed and printed.flops) or "-",
                report.params,
                report.flops,
                {True: "yes", False: "no", None: "-"}[report.agrees],
                f"{report.cost.params:,}",
                f"{report.attention.params:,}",
                *counts(report.cost),
            ]
        )
    print_columns(rows)
    print()
    print_legend(
        [
            (
                "published",
                "as printed by the authors, M = 2^20, G = 2^30; - where nothing is at hand for the"
                " network at this ksize, image size and number of classes",
            ),
            ("counted", "parameters, and FLOPs by the rule of thop mid-2019, in the same units"),
            ("agree", "whether the counted figures, rounded, are the published ones"),
            ("attention", "parameters of the ECA or SE layers, part of all"),
            *conventions_legend(),
        ]
    )
    notes = [note for note in map(disagreement, reports) if note]
    if notes:
        print("\nWhere they do not agree:")
        for note in notes:
            print(textwrap.fill(note, 120, initial_indent="  ", subsequent_indent="    "))


def print_one(report: Report) -> None:
    cost, share, printed = report.cost, report.attention, report.published
    size = report.img_size
    ksize = f", ksize {ksize_text(report.ksize)}" if report.ksize else ""
    print(f"{report.network}{ksize}, {report.num_classes} classes, one image of 3x{size}x{size}\n")
    rows = [["", "exact", "of it attention", "2^20, 2^30", "10^6, 10^9", "published"]]
    rows.append(
        [
            "parameters",
            f"{cost.params:,}",
            f"{share.params:,}",
            report.params,
            f"{cost.params / 1e6:.2f}M",
            printed.params if printed else "-",
        ]
    )
    published_flops = [(printed and printed.flops) or "-", "", ""]
    for i, name in enumerate(CONVENTIONS):
        total = getattr(cost, name)
        rows.append(
            [
                titles()[i],
                counts(cost)[i],
                f"{getattr(share, name):,}",
                format_flops(total),
                format_flops(total, 1000),
                published_flops[i],
            ]
        )
    print_columns(rows)
    print()
    if report.agrees:
        print(f"Agrees with {printed.source}.")
    elif printed:
        print(textwrap.fill(f"Does not agree with {printed.source}: {disagreement(report)}", 120))
    print_legend(conventions_legend())


def print_layers(report: Report) -> None:
    """Every layer in the order of its first call; the sums are exact."""
    rows = [["layer", "kind", "output", "calls", "parameters", *titles()]]
    for layer in report.cost.layers:
        by_convention = [f"{getattr(layer, name):,}" for name in CONVENTIONS]
        rows.append(
            [
                layer.name,
                layer.kind,
                shape_text(layer.output),
                str(layer.calls),
                f"{layer.params:,}",
                *by_convention,
            ]
        )
    sums = [f"{getattr(report.cost, name):,}" for name in CONVENTIONS]
    rows.append(["sum", "", "", "", f"{report.cost.params:,}", *sums])
    print_columns(rows, left=2)
    print()


def as_json(report: Report, per_layer: bool) -> dict:
    cost, share = report.cost, report.attention
    printed = report.published and asdict(report.published)
    fields = {
        "network": report.network,
        "ksize": report.ksize,
        "num_classes": report.num_classes,
        "input": [1, 3, report.img_size, report.img_size],
        "parameters": cost.params,
        "flops": {"mid_2019_printed": cost.mid_2019_printed}
        | {name: getattr(cost, name) for name in CONVENTIONS},
        "attention": {"parameters": share.params}
        | {name: getattr(share, name) for name in CONVENTIONS},
        "in_published_units": {"parameters": report.params, "flops": report.flops},
        "published": printed,
        "agrees": report.agrees,
        "thop_version": thop_version(),
    }
    if per_layer:
        fields["layers"] = [asdict(layer) for layer in cost.layers]
    return fields


def main() -> None:
    flags = build_parser().parse_args()
    if flags.all and (flags.ksize or flags.per_layer):
        flag = "--ksize" if flags.ksize else "--per-layer"
        raise UserError(f"{flag} is for one network: give -a NAME instead of --all")
    reports = []
    names = networks() if flags.all else [flags.arch]
    for i, name in enumerate(names):
        show_progress(f"counting {name} ({i + 1}/{len(names)})" if flags.all else "")
        reports.append(count(name, flags.ksize, flags.num_classes, flags.img_size))
    show_progress("")
    if flags.json:
        objects = [as_json(report, flags.per_layer) for report in reports]
        print(json.dumps(objects if flags.all else objects[0], indent=2))
    elif flags.all:
        print_all(reports)
    else:
        if flags.per_layer:
            print_layers(reports[0])
        print_one(reports[0])


def show_progress(text: str) -> None:
    """On a terminal only, and on one line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)

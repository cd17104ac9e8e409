"""Makes the tables of parameters and FLOPs, beside the published figures."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from utils.inspection.cost import (
    CONVENTIONS,
    Cost,
    format_flops,
    format_params,
    thop_version,
    titles,
)
from utils.inspection.published import Published
from utils.system.text import columns, ksize_text, paragraphs

WIDTH = 120  # of running text; the tables are as wide as their numbers
MARK = {True: "yes", False: "no", None: "-"}


class Counted(Protocol):
    """Describes a report on one network."""

    published: Published | None  # None: nothing for these settings

    @property
    def network(self) -> str: ...

    @property
    def params(self) -> str: ...  # counted, in the units and the rounding of `published`

    @property
    def flops(self) -> str: ...


def agrees(report: Counted) -> bool | None:
    """Returns whether our figures, rounded, are the published ones; None where there are none."""
    printed = report.published
    if printed is None:
        return None
    return printed.params == report.params and printed.flops in (None, report.flops)


def beside(report: Counted) -> list[str]:
    """Returns five cells: published parameters and FLOPs, ours, and whether they agree."""
    printed = report.published
    theirs = [printed.params, printed.flops or "-"] if printed else ["-", "-"]
    return [*theirs, report.params, report.flops, MARK[agrees(report)]]


def disagreements(reports: Sequence[Counted]) -> str:
    """Returns a paragraph on reports that differ from the published figures, or an empty string."""
    lines = []
    for report in reports:
        if agrees(report) is not False:
            continue
        printed = report.published
        said = "; ".join(
            f"published {theirs} {what}, counted {ours}"
            for what, theirs, ours in (
                ("parameters", printed.params, report.params),
                ("FLOPs", printed.flops, report.flops),
            )
            if theirs not in (None, ours)
        )
        note = f"{report.network}: {said}" + (f": {printed.remark}" if printed.remark else "")
        lines.append(textwrap.fill(f"  {note}.", WIDTH, subsequent_indent="    "))
    return "\n".join(["Where published and counted do not agree:", *lines]) if lines else ""


def size_text(size: tuple[int, int]) -> str:
    """Returns height and width, such as 800x1280."""
    return f"{size[0]}x{size[1]}"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Returns what each column is: the titles flush left, the text wrapped beside them."""
    margin = max(len(title) for title, _ in entries) + 2
    return "\n".join(
        textwrap.fill(
            text, WIDTH, initial_indent=title.ljust(margin), subsequent_indent=" " * margin
        )
        for title, text in entries
    )


@dataclass
class Report:
    """Holds one classification network's counts, and what was printed of it."""

    network: str
    ksize: tuple[int, ...] | None
    num_classes: int
    size: tuple[int, int]  # height, width
    cost: Cost
    attention: Cost  # the share of the attention layers, without their sigmoid and product
    published: Published | None  # None: nothing for these settings

    @property
    def params(self) -> str:
        return format_params(self.cost.params)

    @property
    def flops(self) -> str:
        return format_flops(self.cost.mid_2019)


def classification_table(reports: Sequence[Report]) -> str:
    """Returns one line per network; counts are exact, but for what thop of mid-2019 printed."""
    rows = [
        ["", "", "published", "", "counted", "", "", "parameters", "", "FLOPs", "", "", ""],
        ["network", "ksize", "params", "FLOPs", "params", "FLOPs", "agree", "all", "attention"],
    ]
    rows[1] += _titles()
    for report in reports:
        row = [report.network, ksize_text(report.ksize), *beside(report)]
        row += [f"{report.cost.params:,}", f"{report.attention.params:,}", *_counts(report.cost)]
        rows.append(row)
    entries = [
        (
            "published",
            "as printed by the authors, M = 2^20, G = 2^30; - where nothing is at hand for the"
            " network at this ksize, image size and number of classes",
        ),
        ("counted", "parameters, and FLOPs by the rule of thop mid-2019, in the same units"),
        ("agree", "whether the counted figures, rounded, are the published ones"),
        ("attention", "parameters of the ECA or SE layers, part of all"),
        *_conventions(),
    ]
    return paragraphs(
        _setting(reports[0]), columns(rows, gap=1), legend(entries), disagreements(reports)
    )


def network_table(report: Report) -> str:
    """Returns the table of one network, one line per convention."""
    cost, share, printed = report.cost, report.attention, report.published
    params = [f"{cost.params:,}", f"{share.params:,}", report.params]
    params += [format_params(cost.params, base=1000), printed.params if printed else "-"]
    rows = [
        ["", "count", "of it attention", "2^20, 2^30", "10^6, 10^9", "published"],
        ["parameters", *params],
    ]
    for title, name, text in zip(_titles(), _NAMES, _counts(cost), strict=True):
        if name is None:
            rows.append([title, text, "", "", "", ""])
            continue
        total = getattr(cost, name)
        published_flops = (printed and printed.flops) or "-" if name == "mid_2019" else ""
        units = [format_flops(total), format_flops(total, base=1000)]
        rows.append([title, text, f"{getattr(share, name):,}", *units, published_flops])
    ksize = f", ksize {ksize_text(report.ksize)}" if report.ksize else ""
    heading = f"{report.network}{ksize}. {_setting(report)}"
    verdict = f"Agrees with {printed.source}." if agrees(report) else disagreements([report])
    return paragraphs(heading, columns(rows), verdict, legend(_conventions()))


def layer_table(report: Report) -> str:
    """Returns every layer in the order of its first call, and the exact sums, none as thop printed
    it.
    """
    rows = [["layer", "kind", "output", "calls", "parameters", *titles()]]
    for layer in report.cost.layers:
        row = [layer.name, layer.kind, "x".join(map(str, layer.output)), str(layer.calls)]
        numbers = [layer.params, *(getattr(layer, name) for name in CONVENTIONS)]
        rows.append(row + [f"{n:,}" for n in numbers])
    sums = [report.cost.params, *(getattr(report.cost, name) for name in CONVENTIONS)]
    rows.append(["exact sum", "", "", "", *(f"{n:,}" for n in sums)])
    return columns(rows, left=2)


def report_fields(report: Report, layers: bool = False) -> dict:
    """Returns the report as plain values for JSON; `layers` adds a list of every layer."""
    cost, share = report.cost, report.attention
    fields = {
        "network": report.network,
        "ksize": report.ksize,
        "num_classes": report.num_classes,
        "input": [1, 3, *report.size],
        "parameters": cost.params,
        "flops": {"mid_2019_printed": cost.mid_2019_printed}
        | {name: getattr(cost, name) for name in CONVENTIONS},
        "attention": {"parameters": share.params}
        | {name: getattr(share, name) for name in CONVENTIONS},
        "in_published_units": {"parameters": report.params, "flops": report.flops},
        "published": report.published and asdict(report.published),
        "agrees": agrees(report),
        "thop_version": thop_version(),
    }
    if layers:
        fields["layers"] = [asdict(layer) for layer in cost.layers]
    return fields


def _setting(report: Report) -> str:
    return f"One image of 3x{size_text(report.size)}, {report.num_classes} classes."


def _conventions() -> list[tuple[str, str]]:
    texts = [text for _, text in CONVENTIONS.values()]
    exact = "the same before it was rounded to single precision: 24 binary digits."
    return list(zip(_titles(), [texts[0], exact, *texts[1:]], strict=True))


# The columns and lines of counts: what thop of mid-2019 printed, its exact sum, and the others.
_NAMES = ("mid_2019", None, "thop_today", "multiply_adds")


def _titles() -> list[str]:
    first, *rest = titles()
    return [first, "exact sum", *rest]


def _counts(cost: Cost) -> list[str]:
    counts = (cost.mid_2019_printed, cost.mid_2019, cost.thop_today, cost.multiply_adds)
    return [f"{n:,}" for n in counts]


LEGEND = (
    (
        "trainable",
        "parameters, the affine part of BatchNorm among them, without the frozen stem and layer1",
    ),
    ("attention", "parameters of the ECA or SE layers, frozen ones too"),
    (
        "published rule",
        "FLOPs: MACs, 1 per output for a bias of a convolution, 2 per element of a BatchNorm, 1 of"
        " a ReLU but the RPN's, 1 per input of a pooling; a transposed convolution 4 times over, as"
        " the authors' tool did. 1000 regions in the box head, 100 in the mask head.",
    ),
    ("MACs", "multiply-adds of convolutions and linear layers and nothing else"),
)


@dataclass
class DetectorReport:
    """Holds one detector's counts by the rule of the COCO table, and what was printed of it."""

    detector: str
    backbone: str
    ksize: tuple[int, ...] | None
    num_classes: int
    size: tuple[int, int]
    trainable: int  # parameters that a gradient reaches: the published Param.
    all_params: int
    attention_params: int
    published_rule: int
    multiply_adds: int
    published: Published | None

    @property
    def network(self) -> str:
        return f"{self.detector} {self.backbone}"

    @property
    def params(self) -> str:
        return format_params(self.trainable, base=1000)

    @property
    def flops(self) -> str:
        return format_flops(self.published_rule, base=1000)


def detection_table(reports: Sequence[DetectorReport]) -> str:
    """Returns one line per detector, all counts exact."""
    rows = [
        ["", "", "", "published", "", "counted", "", "", "parameters", "", "FLOPs", ""],
        ["detector", "backbone", "ksize", "params", "FLOPs", "params", "FLOPs", "agree"],
    ]
    rows[1] += ["trainable", "attention", "published rule", "MACs"]
    for report in reports:
        row = [report.detector, report.backbone, ksize_text(report.ksize), *beside(report)]
        row += [f"{report.trainable:,}", f"{report.attention_params:,}"]
        row += [f"{report.published_rule:,}", f"{report.multiply_adds:,}"]
        rows.append(row)
    entries = [
        (
            "published",
            "as printed by the authors, M = 10^6, G = 10^9; - where nothing is at hand for the"
            " detector at this ksize, image size and number of classes",
        ),
        ("counted", "trainable parameters, and FLOPs by the published rule, in the same units"),
        ("agree", "whether the counted figures, rounded, are the published ones"),
        *LEGEND,
    ]
    setting = f"One image of 3x{size_text(reports[0].size)}."
    return paragraphs(setting, columns(rows, left=2), legend(entries), disagreements(reports))


def detector_table(report: DetectorReport) -> str:
    """Returns the table of one detector, one line per count."""
    printed = report.published
    rows = [
        ["", "count", "10^6, 10^9", "published"],
        ["parameters", f"{report.all_params:,}", format_params(report.all_params, base=1000), ""],
        ["trainable", f"{report.trainable:,}", report.params, printed.params if printed else "-"],
        ["attention", f"{report.attention_params:,}", "", ""],
        [
            "published rule",
            f"{report.published_rule:,}",
            report.flops,
            (printed and printed.flops) or "-",
        ],
        ["MACs", f"{report.multiply_adds:,}", format_flops(report.multiply_adds, base=1000), ""],
    ]
    ksize = f", ksize {ksize_text(report.ksize)}" if report.ksize else ""
    heading = (
        f"{report.detector} on {report.backbone}{ksize}."
        f" One image of 3x{size_text(report.size)}, {report.num_classes} classes."
    )
    verdict = f"Agrees with {printed.source}." if agrees(report) else disagreements([report])
    return paragraphs(heading, columns(rows), verdict, legend(LEGEND))


def detector_fields(report: DetectorReport) -> dict:
    """Returns the report as plain values for JSON."""
    return {
        "detector": report.detector,
        "backbone": report.backbone,
        "ksize": report.ksize,
        "num_classes": report.num_classes,
        "input": [1, 3, *report.size],
        "parameters": report.all_params,
        "trainable_parameters": report.trainable,
        "attention": {"parameters": report.attention_params},
        "flops": {
            "published_rule": report.published_rule,
            "multiply_adds": report.multiply_adds,
        },
        "in_published_units": {"parameters": report.params, "flops": report.flops},
        "published": report.published and asdict(report.published),
        "agrees": agrees(report),
    }

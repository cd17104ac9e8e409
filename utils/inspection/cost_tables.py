"""Makes the tables of parameters and FLOPs, beside the published figures."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
Legend = Sequence[tuple[str, str]]


@dataclass(kw_only=True)
class Report:
    """Holds one network's counts, and what was printed of it.

    Args:
        network: its name; a detector's with its backbone's.
        size: height, width of the image.
        params, flops: as counted, in the units and the rounding of `published`.
        published: None: nothing was printed for these settings.
    """

    network: str
    ksize: tuple[int, ...] | None
    num_classes: int
    size: tuple[int, int]
    params: str
    flops: str
    published: Published | None

    @property
    def agrees(self) -> bool | None:
        """Returns whether our figures, rounded, are the published ones; None without those."""
        printed = self.published
        if printed is None:
            return None
        return printed.params == self.params and printed.flops in (None, self.flops)

    @property
    def theirs(self) -> list[str]:
        """Returns the published parameters and FLOPs, - where there are none."""
        printed = self.published
        return [printed.params, printed.flops or "-"] if printed else ["-", "-"]

    @property
    def setting(self) -> str:
        """Returns a sentence on the image and the classes."""
        return f"One image of 3x{size_text(self.size)}, {self.num_classes} classes."

    @property
    def verdict(self) -> str:
        """Returns a sentence on whether the counts are the published ones."""
        if self.agrees and self.published:
            return f"Agrees with {self.published.source}."
        return disagreements([self])

    @property
    def plain(self) -> dict:
        """Returns what both kinds of network have in JSON."""
        return {
            "ksize": self.ksize,
            "num_classes": self.num_classes,
            "input": [1, 3, *self.size],
            "in_published_units": {"parameters": self.params, "flops": self.flops},
            "published": self.published and asdict(self.published),
            "agrees": self.agrees,
        }


@dataclass(kw_only=True)
class ClassifierReport(Report):
    """Holds a classifier's costs: all, and the share of its attention layers, without their
    sigmoid and product.
    """

    cost: Cost
    attention: Cost


@dataclass(kw_only=True)
class DetectorReport(Report):
    """Holds a detector's counts by the rule of the COCO table; `trainable` are its `Param.`."""

    detector: str
    backbone: str
    trainable: int
    all_params: int
    attention_params: int
    published_rule: int
    multiply_adds: int


def disagreements(reports: Sequence[Report]) -> str:
    """Returns a paragraph on reports that differ from the published figures, or an empty string."""
    lines = []
    for report in reports:
        printed = report.published
        if printed is None or report.agrees:
            continue
        differences = "; ".join(
            f"published {theirs} {what}, counted {ours}"
            for what, theirs, ours in (
                ("parameters", printed.params, report.params),
                ("FLOPs", printed.flops, report.flops),
            )
            if theirs not in (None, ours)
        )
        note = f"{report.network}: {differences}" + f": {printed.remark}" * bool(printed.remark)
        lines.append(textwrap.fill(f"  {note}.", WIDTH, subsequent_indent="    "))
    return "\n".join(["Where published and counted do not agree:", *lines]) if lines else ""


def size_text(size: tuple[int, int]) -> str:
    """Returns height and width, such as 800x1280."""
    return f"{size[0]}x{size[1]}"


def legend(entries: Legend) -> str:
    """Returns what each column is: the titles flush left, the text wrapped beside them."""
    margin = max(len(title) for title, _ in entries) + 2
    return "\n".join(
        textwrap.fill(
            text, WIDTH, initial_indent=title.ljust(margin), subsequent_indent=" " * margin
        )
        for title, text in entries
    )


def _table(reports: Sequence[Report], rows: list[list[str]], entries: Legend, **style: int) -> str:
    """Returns a table of networks with the columns of what was published and what is counted.

    Args:
        rows: two headings and a row a network, without these columns, which come behind `ksize`.
    """
    head = ["params", "FLOPs", "params", "FLOPs", "agree"]
    middle = [["published", "", "counted", "", ""], head]
    middle += [[*r.theirs, r.params, r.flops, MARK[r.agrees]] for r in reports]
    at = rows[1].index("ksize") + 1
    rows = [[*row[:at], *five, *row[at:]] for row, five in zip(rows, middle, strict=True)]
    return paragraphs(columns(rows, **style), legend(entries), disagreements(reports))


def _published_legend(units: str, network: str, counted: str) -> Legend:
    return (
        (
            "published",
            f"as printed by the authors, {units}; - where nothing is at hand for the {network} at"
            " this ksize, image size and number of classes",
        ),
        ("counted", counted),
        ("agree", "whether the counted figures, rounded, are the published ones"),
    )


def classification_table(reports: Sequence[ClassifierReport]) -> str:
    """Returns one line per network; counts are exact, but for what thop of mid-2019 printed."""
    rows = [
        ["", "", "parameters", "", "FLOPs", "", "", ""],
        ["network", "ksize", "all", "attention", *_titles()],
    ]
    for report in reports:
        row = [report.network, ksize_text(report.ksize), f"{report.cost.params:,}"]
        rows.append([*row, f"{report.attention.params:,}", *_counts(report.cost)])
    counted = "parameters, and FLOPs by the rule of thop mid-2019, in the same units"
    entries = [
        *_published_legend("M = 2^20, G = 2^30", "network", counted),
        ("attention", "parameters of the ECA or SE layers, part of all"),
        *_conventions(),
    ]
    return paragraphs(reports[0].setting, _table(reports, rows, entries, gap=1))


def network_table(report: ClassifierReport) -> str:
    """Returns the table of one network, one line per convention."""
    cost, share, (params, flops) = report.cost, report.attention, report.theirs
    in_millions = format_params(cost.params, base=1000)
    rows = [
        ["", "count", "of it attention", "2^20, 2^30", "10^6, 10^9", "published"],
        ["parameters", f"{cost.params:,}", f"{share.params:,}", report.params, in_millions, params],
    ]
    for title, name, text in zip(_titles(), _NAMES, _counts(cost), strict=True):
        if name is None:
            rows.append([title, text, "", "", "", ""])
            continue
        total = getattr(cost, name)
        units = [format_flops(total), format_flops(total, base=1000)]
        printed = flops if name == "mid_2019" else ""
        rows.append([title, text, f"{getattr(share, name):,}", *units, printed])
    ksize = f", ksize {ksize_text(report.ksize)}" if report.ksize else ""
    heading = f"{report.network}{ksize}. {report.setting}"
    return paragraphs(heading, columns(rows), report.verdict, legend(_conventions()))


def layer_table(report: ClassifierReport) -> str:
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


def report_fields(report: ClassifierReport, layers: bool = False) -> dict:
    """Returns the report as plain values for JSON; `layers` adds a list of every layer."""
    cost, share = report.cost, report.attention
    counts, of_attention = ({n: getattr(c, n) for n in CONVENTIONS} for c in (cost, share))
    fields = {
        "network": report.network,
        **report.plain,
        "parameters": cost.params,
        "flops": {"mid_2019_printed": cost.mid_2019_printed, **counts},
        "attention": {"parameters": share.params, **of_attention},
        "thop_version": thop_version(),
    }
    if layers:
        fields["layers"] = [asdict(layer) for layer in cost.layers]
    return fields


def _conventions() -> Legend:
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


OF_DETECTORS = (
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


def detection_table(reports: Sequence[DetectorReport]) -> str:
    """Returns one line per detector, all counts exact."""
    rows = [
        ["", "", "", "parameters", "", "FLOPs", ""],
        ["detector", "backbone", "ksize", "trainable", "attention", "published rule", "MACs"],
    ]
    for r in reports:
        counts = (r.trainable, r.attention_params, r.published_rule, r.multiply_adds)
        rows.append([r.detector, r.backbone, ksize_text(r.ksize), *(f"{n:,}" for n in counts)])
    counted = "trainable parameters, and FLOPs by the published rule, in the same units"
    entries = (*_published_legend("M = 10^6, G = 10^9", "detector", counted), *OF_DETECTORS)
    setting = f"One image of 3x{size_text(reports[0].size)}."
    return paragraphs(setting, _table(reports, rows, entries, left=2))


def detector_table(report: DetectorReport) -> str:
    """Returns the table of one detector, one line per count."""
    params, flops = report.theirs
    in_millions = format_params(report.all_params, base=1000)
    in_billions = format_flops(report.multiply_adds, base=1000)
    rows = [
        ["", "count", "10^6, 10^9", "published"],
        ["parameters", f"{report.all_params:,}", in_millions, ""],
        ["trainable", f"{report.trainable:,}", report.params, params],
        ["attention", f"{report.attention_params:,}", "", ""],
        ["published rule", f"{report.published_rule:,}", report.flops, flops],
        ["MACs", f"{report.multiply_adds:,}", in_billions, ""],
    ]
    ksize = f", ksize {ksize_text(report.ksize)}" if report.ksize else ""
    heading = f"{report.detector} on {report.backbone}{ksize}. {report.setting}"
    return paragraphs(heading, columns(rows), report.verdict, legend(OF_DETECTORS))


def detector_fields(report: DetectorReport) -> dict:
    """Returns the report as plain values for JSON."""
    rule, macs = report.published_rule, report.multiply_adds
    return {
        "detector": report.detector,
        "backbone": report.backbone,
        **report.plain,
        "parameters": report.all_params,
        "trainable_parameters": report.trainable,
        "attention": {"parameters": report.attention_params},
        "flops": {"published_rule": rule, "multiply_adds": macs},
    }

"""Writes counted classification networks as text tables and JSON, beside the published figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from utils.cost.classifier_cost import (
    CONVENTIONS,
    Cost,
    format_flops,
    format_params,
    thop_version,
    titles,
)
from utils.cost.published import Published
from utils.cost.table_parts import agrees, beside, disagreements, legend, size_text
from utils.system.text import columns, ksize_text, paragraphs


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

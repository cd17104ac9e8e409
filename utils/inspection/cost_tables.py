"""Reports parameters and FLOPs beside the published figures: as plain values, and as tables."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from models import create_model, list_models
from utils.inspection import published
from utils.inspection.cost import (
    CONVENTIONS,
    Cost,
    count_cost,
    count_parameters,
    detection_macs,
    format_flops,
    format_params,
    mid_2019_flops,
    published_detection_flops,
    thop_version,
)
from utils.system.errors import UserError
from utils.system.text import columns, ksize_text, paragraphs

WIDTH = 120  # of running text; the tables are as wide as their numbers
MARK = {True: "yes", False: "no", None: "-"}
# Columns and lines of FLOPs: what thop of mid-2019 printed, its exact sum, and the others.
COUNTS = ("mid_2019_printed", *CONVENTIONS)
Report = dict[str, Any]  # plain values, as they are printed as JSON
Legend = Sequence[tuple[str, str]]
Size = tuple[int, int]  # height, width


def classifier_report(network: Any, size: Size, plain: Cost) -> Report:
    """Counts a classifier on one image, beside what was published for the same settings.

    Args:
        network: on `meta`.
        plain: of the same network without attention; what it lacks is the attention's share, but
            for products and other functions, which most conventions leave out.
    """
    cost = plain if network.attention == "none" else count_cost(network, (1, 3, *size))
    printed = published.IMAGENET.get(network.arch)
    if network.attention != own_attention(network.arch):
        printed = published.WITH_ATTENTION.get((plain_name(network.arch), network.attention))
    if (network.num_classes, size) != (1000, published.IMAGENET_SIZE):
        printed = None
    return {
        "network": network.arch,
        **_beside(network, size, format_params(cost.params), format_flops(cost.mid_2019), printed),
        "parameters": cost.params,
        "flops": {name: getattr(cost, name) for name in COUNTS},
        "attention": {"name": network.attention, "parameters": cost.params - plain.params}
        | {name: getattr(cost, name) - getattr(plain, name) for name in CONVENTIONS},
        "thop_version": thop_version(),
        "layers": [asdict(layer) for layer in cost.layers],
    }


def own_attention(arch: str) -> str:
    """Returns the attention that a network's name says."""
    return next((kind for kind in ("eca", "se") if arch.startswith(f"{kind}_")), "none")


def plain_name(arch: str) -> str:
    """Returns the name of the same network without attention: resnet50 of eca_resnet50."""
    return arch.removeprefix("eca_").removeprefix("se_")


def detector_report(network: Any, size: Size, plain: nn.Module, first_label: int) -> Report:
    """Counts a detector on one image, by the rule of the COCO table.

    Args:
        network: on `meta`.
    """
    printed = published.COCO.get((network.arch, network.backbone_arch))
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    flops = published_detection_flops(network, size)
    theirs = (80, published.COCO_SIZE, "eca")
    if (network.num_classes - first_label, size, network.attention) != theirs:
        printed = None
    units = format_params(trainable, base=1000), format_flops(flops, base=1000)
    total = count_parameters(network)
    return {
        "network": f"{network.arch} {network.backbone_arch}",
        "detector": network.arch,
        "backbone": network.backbone_arch,
        **_beside(network, size, *units, printed),
        "parameters": total,
        "trainable_parameters": trainable,
        "attention": {"name": network.attention, "parameters": total - count_parameters(plain)},
        "flops": {"published_rule": flops, "multiply_adds": detection_macs(network, size)},
    }


def _beside(
    network: Any, size: Size, params: str, flops: str, printed: published.Published | None
) -> dict[str, Any]:
    """Returns the settings, and our figures, in the published units and rounding, beside those."""
    agrees = None
    if printed and printed.ksize != network.ksize:
        printed = None
    if printed:
        agrees = printed.params == params and printed.flops in (None, flops)
    return {
        "ksize": network.ksize,
        "num_classes": network.num_classes,
        "input": [1, 3, *size],
        "in_published_units": {"parameters": params, "flops": flops},
        "published": printed and asdict(printed),
        "agrees": agrees,
    }


def size_text(size: Sequence[int]) -> str:
    """Returns height and width, such as 800x1280."""
    return f"{size[-2]}x{size[-1]}"


def legend(entries: Legend) -> str:
    """Returns what each column is: the titles flush left, the text wrapped beside them."""
    margin = max(len(title) for title, _ in entries) + 2
    return "\n".join(
        textwrap.fill(
            text, WIDTH, initial_indent=title.ljust(margin), subsequent_indent=" " * margin
        )
        for title, text in entries
    )


def list_text(pattern: str) -> str:
    """Returns a table of the networks whose names match a pattern, as in a shell: `*50`.

    Raises:
        UserError: none does.
    """
    rows = [["network", "ksize", "parameters", "FLOPs", "top-1 / top-5"]]
    for name in list_models(pattern):
        with torch.device("meta"):
            network: Any = create_model(name)
        printed = published.IMAGENET.get(network.arch)
        flops = format_flops(mid_2019_flops(network, (1, 3, *published.IMAGENET_SIZE)))
        params, accuracy = f"{count_parameters(network):,}", (printed and printed.accuracy) or "-"
        rows.append([name, ksize_text(network.ksize), params, flops, accuracy])
    if len(rows) == 1:
        raise UserError(f"no network matches {pattern}; leave the pattern out to see all")
    notes = (
        "1000 classes, 224x224 pixels; FLOPs as published, G = 2^30, M = 2^20; accuracy in %: of "
        "the released weights, as published; - where none was. docs/ECA_ANYWHERE.md: ECA in other "
        "networks"
    )
    return paragraphs(columns(rows), textwrap.fill(notes, WIDTH))


def disagreements(reports: Sequence[Report]) -> str:
    """Returns a paragraph on reports that differ from the published figures, or an empty string."""
    lines = []
    for report in reports:
        if report["agrees"] is not False:
            continue
        printed, ours = report["published"], report["in_published_units"]
        pairs = (printed["params"], ours["parameters"]), (printed["flops"], ours["flops"])
        differences = "; ".join(
            f"published {theirs} {name}, counted {own}"
            for name, (theirs, own) in zip(("parameters", "FLOPs"), pairs, strict=True)
            if theirs not in (None, own)
        )
        remark = f": {printed['remark']}" * bool(printed["remark"])
        note = f"  {report['network']}: {differences}{remark}."
        lines.append(textwrap.fill(note, WIDTH, subsequent_indent="    "))
    return "\n".join(["Where published and counted do not agree:", *lines]) if lines else ""


def _theirs(report: Report) -> list[str]:
    """Returns the published parameters and FLOPs, - where there are none."""
    return [(report["published"] or {}).get(name) or "-" for name in ("params", "flops")]


def _table(reports: Sequence[Report], rows: list[list[str]], entries: Legend, **style: int) -> str:
    """Returns a table of networks; what was published and counted comes behind `ksize`."""
    head = ["params", "FLOPs", "params", "FLOPs", "agree"]
    middle = [["published", "", "counted", "", ""], head]
    middle += [[*_theirs(r), *r["in_published_units"].values(), MARK[r["agrees"]]] for r in reports]
    at = rows[1].index("ksize") + 1
    rows = [[*row[:at], *five, *row[at:]] for row, five in zip(rows, middle, strict=True)]
    return paragraphs(columns(rows, **style), legend(entries), disagreements(reports))


def _one(report: Report, name: str, rows: list[list[str]], entries: Legend) -> str:
    """Returns the text of a single network: heading, table, whether it agrees, and the legend."""
    kind = report["attention"]["name"]
    if kind != own_attention(report["network"].split()[-1]):
        name += f" with attention {kind}"
    ksize = f", ksize {ksize_text(report['ksize'])}" if report["ksize"] else ""
    setting = f"One image of 3x{size_text(report['input'])}, {report['num_classes']} classes."
    verdict = disagreements([report])
    if report["agrees"]:
        verdict = f"Agrees with {report['published']['source']}."
    return paragraphs(f"{name}{ksize}. {setting}", columns(rows), verdict, legend(entries))


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


def classification_table(reports: Sequence[Report]) -> str:
    """Returns one line per network; counts are exact, but for what thop of mid-2019 printed."""
    rows = [
        ["", "", "parameters", "", "FLOPs", "", "", ""],
        ["network", "ksize", "all", "attention", *_titles()],
    ]
    for r in reports:
        counts = (r["parameters"], r["attention"]["parameters"], *r["flops"].values())
        rows.append([r["network"], ksize_text(r["ksize"]), *(f"{n:,}" for n in counts)])
    counted = "parameters, and FLOPs by the rule of thop mid-2019, in the same units"
    entries = [
        *_published_legend("M = 2^20, G = 2^30", "network", counted),
        ("attention", "parameters of the attention layers, part of all"),
        *_conventions(),
    ]
    size, classes = size_text(reports[0]["input"]), reports[0]["num_classes"]
    setting = f"One image of 3x{size}, {classes} classes."
    return paragraphs(setting, _table(reports, rows, entries, gap=1))


def network_table(report: Report) -> str:
    """Returns the table of one network, one line per convention."""
    share, (params, flops), count = report["attention"], _theirs(report), report["parameters"]
    units = [report["in_published_units"]["parameters"], format_params(count, base=1000)]
    rows = [
        ["", "count", "of it attention", "2^20, 2^30", "10^6, 10^9", "published"],
        ["parameters", f"{count:,}", f"{share['parameters']:,}", *units, params],
    ]
    for title, (name, total) in zip(_titles(), report["flops"].items(), strict=True):
        row = [title, f"{total:,}", "", "", "", ""]
        if name != "mid_2019":  # the exact sum of the line above it
            part = share[name.removesuffix("_printed")]
            exact = report["flops"][name.removesuffix("_printed")]
            row[2:5] = f"{part:,}", format_flops(exact), format_flops(exact, base=1000)
        if name == "mid_2019_printed":
            row[5] = flops
        rows.append(row)
    return _one(report, report["network"], rows, _conventions())


def layer_table(report: Report) -> str:
    """Returns every layer in the order of its first call, and the exact sums."""
    first, _, *others = _titles()
    rows = [["layer", "kind", "output", "calls", "parameters", first, *others]]
    for layer in report["layers"]:
        output = "x".join(map(str, layer["output"]))
        numbers = [f"{layer[name]:,}" for name in ("params", *CONVENTIONS)]
        rows.append([layer["name"], layer["kind"], output, str(layer["calls"]), *numbers])
    sums = [report["parameters"], *(report["flops"][name] for name in CONVENTIONS)]
    rows.append(["exact sum", "", "", "", *(f"{n:,}" for n in sums)])
    return columns(rows, left=2)


def _titles() -> list[str]:
    version = thop_version()
    first, *others = (title.format(version=version) for title, _ in CONVENTIONS.values())
    return [first, "exact sum", *others]


def _conventions() -> Legend:
    texts = [text for _, text in CONVENTIONS.values()]
    exact = "the same before it was rounded to single precision: 24 binary digits."
    return list(zip(_titles(), [texts[0], exact, *texts[1:]], strict=True))


OF_DETECTORS = (
    (
        "trainable",
        "parameters, the affine part of BatchNorm among them, without the frozen stem and layer1",
    ),
    ("attention", "parameters of the attention layers, frozen ones too"),
    (
        "published rule",
        "FLOPs: MACs, 1 per output for a bias of a convolution, 2 per element of a BatchNorm, 1 of"
        " a ReLU but the RPN's, 1 per input of a pooling; a transposed convolution 4 times over, as"
        " the authors' tool did. 1000 regions in the box head, 100 in the mask head.",
    ),
    ("MACs", "multiply-adds of convolutions and linear layers and nothing else"),
)


def detection_table(reports: Sequence[Report]) -> str:
    """Returns one line per detector, all counts exact."""
    rows = [
        ["", "", "", "parameters", "", "FLOPs", ""],
        ["detector", "backbone", "ksize", "trainable", "attention", "published rule", "MACs"],
    ]
    for r in reports:
        counts = (r["trainable_parameters"], r["attention"]["parameters"], *r["flops"].values())
        rows.append([*r["network"].split(), ksize_text(r["ksize"]), *(f"{n:,}" for n in counts)])
    counted = "trainable parameters, and FLOPs by the published rule, in the same units"
    entries = (*_published_legend("M = 10^6, G = 10^9", "detector", counted), *OF_DETECTORS)
    setting = f"One image of 3x{size_text(reports[0]['input'])}."
    return paragraphs(setting, _table(reports, rows, entries, left=2))


def detector_table(report: Report) -> str:
    """Returns the table of one detector, one line per count."""
    (params, flops), flop_counts = _theirs(report), report["flops"]
    ours, count = report["in_published_units"], report["parameters"]
    macs = flop_counts["multiply_adds"]
    rows = [
        ["", "count", "10^6, 10^9", "published"],
        ["parameters", f"{count:,}", format_params(count, base=1000), ""],
        ["trainable", f"{report['trainable_parameters']:,}", ours["parameters"], params],
        ["attention", f"{report['attention']['parameters']:,}", "", ""],
        ["published rule", f"{flop_counts['published_rule']:,}", ours["flops"], flops],
        ["MACs", f"{macs:,}", format_flops(macs, base=1000), ""],
    ]
    return _one(report, report["network"].replace(" ", " on "), rows, OF_DETECTORS)

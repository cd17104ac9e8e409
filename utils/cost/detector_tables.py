"""Writes counted detectors as text tables and as JSON, beside the published figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from utils.cost.classifier_cost import format_flops, format_params
from utils.cost.published import Published
from utils.cost.table_parts import agrees, beside, disagreements, legend, size_text
from utils.system.text import columns, ksize_text, paragraphs

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

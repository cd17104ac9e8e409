"""Writes what is known of a run into one HTML file that needs no other file and no network.

python -m tools.run_report runs/eca_resnet18-1
python -m tools.run_report runs/mask_rcnn_eca_resnet50-1 --output report.html
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.eca_module import ECALayer
from models.inspection import attention_layers
from models.weights import network_from_checkpoint
from tools.compare_runs import RESULTS, Run, first_weights, read_run
from utils.classification.outcome import CLASSIFICATION
from utils.detection.outcome import DETECTION
from utils.inspection import svg_curves
from utils.inspection.channel_weights import LayerWeights
from utils.inspection.html_page import (
    MARK,
    Section,
    folded,
    page,
    paragraph,
    picture,
    settings_table,
    table,
    text,
    tiles,
)
from utils.inspection.report_section import newest_report, picture_of, report_sections
from utils.options.parser import Parser, run_script
from utils.runs import checkpoint
from utils.runs.checkpoint_info import describes_detector
from utils.system import output_checks
from utils.system.errors import UserError
from utils.system.files import write_atomically
from utils.system.text import ksize_text, printable

NAME = "report.html"
ATTENTION = "attention"  # a folder of visualize_attention.py inside the run's


def main() -> int:
    parser = Parser(prog="python -m tools.run_report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run of main.py or detect_main.py")
    parser.add_argument("--output", metavar="FILE", help=f"default: RUN/{NAME}")
    args = parser.parse_args()
    folder = Path(args.run)
    target = Path(args.output) if args.output else folder / NAME
    run = read_run(folder)
    check_run(run)
    output_checks.check_own_file(target, MARK)
    record = json.loads((folder / "args.json").read_text())
    saved, note = read_checkpoint(folder)
    if note:
        print(f"! {printable(note)}")
    data = page(folder.resolve().name, head_of(run, record), sections_of(run, record, saved, note))
    write_atomically(target, data)
    print(f"written to {printable(target)} ({len(data) / 1e6:.1f} MB)")
    return 0


def check_run(run: Run) -> None:
    """Refuses numbers that no run writes: the file may be a stranger's.

    Raises:
        UserError: an epoch or a kernel size that cannot be.
    """
    epochs = [row["epoch"] for row in run.history]
    sizes = run.ksize or ()
    if not all(0 < e < 1e9 for e in epochs) or not all(isinstance(k, int) for k in sizes):
        raise UserError(f"{run.folder}: metrics.csv or args.json is not what a run writes")


def read_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Returns the contents of the best checkpoint, or the last, or None and why."""
    try:
        found = checkpoint.CheckpointFolder(folder).newest_good(best_first=True)
    except UserError as error:
        return None, str(error)
    if found is None:
        return None, f"{folder}: holds no checkpoint"
    return found[1], ""


def head_of(run: Run, record: Mapping[str, Any]) -> str:
    """Returns the lines and figures below the title."""
    data = _part(record, "args").get("data", "")
    best = run.best
    facts: dict[str, object] = {}
    for title, column in RESULTS[run.decides]:
        if column in best:
            unit = "" if "loss" in column or best[column] < 0 else " %"
            facts[title] = _figure(column, best[column]) + unit
    facts["best epoch"] = f"{best['epoch']:.0f}"
    facts["epochs"] = f"{len(run.history)} of {run.epochs}"
    if isinstance(record.get("parameters"), int):
        facts["parameters"] = f"{record['parameters'] / 1e6:.2f} M"
    if isinstance(record.get("train_images"), int):
        facts["training images"] = f"{record['train_images']:,}"
    words = f"{run.arch} on {data}" if data else run.arch
    return f'<p class="soft">{text(words)}</p>{tiles(facts)}'


def sections_of(
    run: Run, record: Mapping[str, Any], saved: dict[str, Any] | None, note: str
) -> list[Section]:
    """Returns the page's parts."""
    report = newest_report(run.folder)
    if report is not None:
        judged = report_sections(report)
    else:
        judged = [_objects(saved)] if describes_detector(record) else [_no_report(run, record)]
    return [
        _curves(run, record),
        *judged,
        _network(run, record, saved, note),
        _settings(record),
        Section("Versions", "versions", settings_table(_shown(_part(record, "environment")))),
    ]


def _curves(run: Run, record: Mapping[str, Any]) -> Section:
    outcome = DETECTION if describes_detector(record) else CLASSIFICATION
    best = int(run.best["epoch"])
    charts = []
    for panel in outcome.panels(run.history):
        lines = [
            svg_curves.Line(
                [
                    (row["epoch"], row[curve.column])
                    for row in run.history
                    if not row.get(curve.column, math.nan) < 0  # -1: nothing could be judged
                    and curve.column in row
                ],
                curve.label,
                curve.colour,
            )
            for curve in panel.curves
        ]
        charts.append(svg_curves.chart(panel.title, panel.unit, lines, best, panel.can_be_log))
    columns = list(run.history[0])
    rows = [[_figure(c, row.get(c, math.nan)) for c in columns] for row in run.history]
    body = paragraph(f"Dotted: the best epoch, {best}.", "soft")
    body += f'<div class="charts">{"".join(charts)}</div>'
    body += folded(f"Every epoch ({len(rows)})", table(columns, rows, words=0))
    return Section("Curves", "curves", body)


def _no_report(run: Run, record: Mapping[str, Any]) -> Section:
    """Says how figures by class are made."""
    data = _part(record, "args").get("data", "DATA")
    command = f"python main.py -e --resume {run.folder / checkpoint.BEST} {data} --report"
    body = paragraph("Figures by class, confusions, calibration and the worst images: run")
    body += f"<p><code>{text(command)}</code></p>" + paragraph("and then this tool again.")
    return Section("Classes", "classes", body)


def _objects(saved: dict[str, Any] | None) -> Section:
    """Shows the average precision of each class of a detector, at the best epoch."""
    best = _part(_part(saved or {}, "progress"), "best")
    summaries = _part(best, "summaries")
    by_class = {kind: _part(_part(summaries, kind), "per_class") for kind in summaries}
    names = list(dict.fromkeys(name for values in by_class.values() for name in values))
    if not names:
        return Section("Classes", "classes", paragraph("The checkpoint holds no AP by class."))
    kinds = {"bbox": "Box AP", "segm": "Mask AP"}
    titles = ("Class", *(kinds.get(kind, kind) for kind in by_class))
    rows = [[n, *(_precision(values.get(n)) for values in by_class.values())] for n in names]
    body = paragraph("Average precision in %, at the best epoch; - where there was no object.")
    return Section("Classes", "classes", body + table(titles, rows))


def _network(
    run: Run, record: Mapping[str, Any], saved: dict[str, Any] | None, note: str
) -> Section:
    ksize = ksize_text(run.ksize)
    classes = record.get("classes")
    classes = len(classes) if isinstance(classes, list) else record.get("num_classes")
    facts = {
        "network": run.arch,
        "attention": record.get("attention", "-"),
        "kernel sizes": ksize,
        "parameters": _count(record.get("parameters")),
        "classes": _count(classes),
        "first weights": ", ".join(first_weights(dict(record)).values()) or "random",
    }
    body = settings_table({k: v for k, v in facts.items() if v is not None})
    if saved is None:
        body += paragraph(f"{note}: no kernels to show.", "soft")
    elif layers := kernels_of(saved):
        from utils.inspection.channel_weight_plots import draw_kernels  # matplotlib is slow

        drawn = draw_kernels(layers, f"{run.arch}, ECA kernels")
        body += picture(drawn, "ECA's kernels", "What each ECA layer has learned.", wide=True)
    folder = run.folder / ATTENTION
    if (folder / "channel_weights.png").exists() and not folder.is_symlink():
        body += picture_of(folder / "channel_weights.png", "Channel weights by class", wide=True)
        body += picture_of(folder / "spread.png", "Channel weights over the depth", wide=True)
    elif ksize != "-" and not describes_detector(record):
        data = _part(record, "args").get("data", "DATA")
        command = (
            f"python visualize_attention.py {run.folder / checkpoint.BEST} {data} --output {folder}"
        )
        body += paragraph("Channel weights need images: run")
        body += f"<p><code>{text(command)}</code></p>" + paragraph("and then this tool again.")
    return Section("Network", "network", body)


def kernels_of(saved: dict[str, Any]) -> list[LayerWeights]:
    """Returns ECA's kernels in a checkpoint of a classifier or a detector, first layer to last."""
    found = []
    if "backbone" not in saved:
        try:
            network = network_from_checkpoint(saved)
        except ValueError:
            return []
        for layer in attention_layers(network):
            if isinstance(layer.layer, ECALayer):
                weight = layer.layer.conv.weight.detach()
                found.append((layer.name, layer.stage, layer.block, weight))
    else:
        for name, tensor in saved["state_dict"].items():
            place = re.search(r"layer(\d+)\.(\d+)\.", name)
            if place and tensor.ndim == 3 and tensor.shape[:2] == (1, 1):
                found.append((name, int(place[1]), int(place[2]) + 1, tensor))
    nothing = np.zeros((1, 1))
    return [
        LayerWeights(
            n, stage, block, nothing, nothing, np.ones(1), weight.flatten().float().numpy()
        )
        for n, stage, block, weight in found
    ]


def _settings(record: Mapping[str, Any]) -> Section:
    recipe = _shown(_part(record, "recipe"))
    flags = {k: v for k, v in _shown(_part(record, "args")).items() if k not in recipe}
    flags |= _shown({k: record[k] for k in ("seed", "train_digest") if k in record})
    body = '<div class="columns">'
    body += f"<div><h3>Recipe</h3>{settings_table(recipe)}</div>"
    body += f"<div><h3>Flags</h3>{settings_table(flags)}</div></div>"
    return Section("Settings", "settings", body)


def _shown(values: Mapping[str, Any]) -> dict[str, object]:
    """Returns the settings that were set, as a reader writes them."""
    switches = {True: "yes", False: "no"}
    return {
        name.replace("_", " "): switches[value] if isinstance(value, bool) else value
        for name, value in values.items()
        if value is not None and value != []
    }


def _part(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a part of a file's contents; empty where it is missing or no mapping."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _precision(value: object) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) and value >= 0 else "-"


def _figure(column: str, value: float) -> str:
    """Returns a number of metrics.csv: a whole epoch, a loss with four digits, others with two."""
    if not math.isfinite(value) or value < 0:  # -1: nothing could be judged
        return "-"
    if column == "epoch":
        return f"{value:.0f}"
    if column == "lr":
        return f"{value:.4g}"
    return f"{value:.4f}" if "loss" in column else f"{value:.2f}"


if __name__ == "__main__":
    run_script(main)

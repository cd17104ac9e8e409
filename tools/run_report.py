"""Writes what is known of a run into one HTML file that needs no other file and no network.

python -m tools.run_report runs/eca_resnet18-1
python -m tools.run_report runs/mask_rcnn_eca_resnet50-1 --output report.html
"""

import base64
import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tools.compare_runs import RESULTS, Run, first_weights, read_run
from utils.command_line.parser import Parser
from utils.runs import checkpoint
from utils.runs.checkpoint import describes_detector
from utils.system.errors import UserError
from utils.system.faults import run_script
from utils.system.files import check_own_file, read_json, write_atomically
from utils.system.text import ksize_text, printable

NAME, REPORT = "report.html", "report.json"
ATTENTION = "attention"  # a folder of visualize_attention.py inside the run's
MARK = "<!-- written by python -m tools.run_report -->"  # what may be replaced by a newer page
ROWS = 20  # of a long table that are shown unfolded
TABLES = {"classes": "Each class, in %", "confused_pairs": "Most confused pairs"}
# Its own policy forbids scripts, and everything that is not in the file.
TEMPLATE = Path(__file__).with_suffix(".html")
Part = Mapping[str, Any]  # what the template shows: text, command, picture, rows and titles


def main() -> int:
    parser = Parser(prog="python -m tools.run_report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run of main.py or detect_main.py")
    parser.add_argument("--output", metavar="FILE", help=f"default: RUN/{NAME}")
    args = parser.parse_args()
    folder = Path(args.run)
    target = Path(args.output) if args.output else folder / NAME
    run = read_run(folder)
    check_own_file(target, MARK)
    try:
        data = page(run, json.loads((folder / "args.json").read_text()))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make the report anew") from None
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error):
        raise UserError(
            f"{folder}: holds files that a run and --report do not write; move its report away, "
            "or make it anew"
        ) from None
    write_atomically(target, data)
    print(f"written to {printable(target)} ({len(data) / 1e6:.1f} MB)")
    return 0


def page(run: Run, record: Mapping[str, Any]) -> bytes:
    """Returns the page of a run; all that it shows is escaped, as text and not as HTML.

    Args:
        record: the contents of the run's args.json.
    """
    environment = jinja2.Environment(
        autoescape=True, finalize=lambda v: v if isinstance(v, Markup) else printable(v)
    )
    environment.filters["encoded"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    environment.filters["is_text"] = lambda cell: not re.fullmatch(r"[-\\d.,/]*", str(cell))
    data, best = record.get("args", {}).get("data"), run.best
    facts: dict[str, object] = {
        title if "loss" in column else f"{title}, %": _figure(best[column])
        for title, column in RESULTS[run.decides]
        if column in best
    }
    facts |= {"best epoch": f"{best['epoch']:.0f}", "epochs": f"{len(run.history)} of {run.epochs}"}
    facts |= {"parameters": record.get("parameters"), "training images": record.get("train_images")}
    shown = {
        "mark": Markup(MARK),
        "title": run.folder.resolve().name,
        "about": f"{run.arch} on {data}" if data else run.arch,
        "facts": dict(_set(facts)),
        "sections": _sections(run, record),
        "most": ROWS,
    }
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(shown).encode()


def _sections(run: Run, record: Mapping[str, Any]) -> dict[str, list[Part]]:
    titles = list(max(run.history, key=len))  # an epoch without an evaluation has fewer
    epochs = [
        [_figure(row[title]) if title in row else "" for title in titles] for row in run.history
    ]
    curves: list[Part] = [*_pictures(run.folder), {"rows": epochs, "titles": titles}]
    recipe, args = record.get("recipe", {}), record.get("args", {})
    flags = {**args, **{name: record.get(name) for name in ("seed", "train_digest")}}
    network = {
        "network": run.arch,
        "attention": record.get("attention"),
        "kernel sizes": ksize_text(run.ksize),
        "first weights": ", ".join(first_weights(dict(record)).values()) or "random",
    }
    settings = {**network, **recipe, **{k: v for k, v in flags.items() if k not in recipe}}
    sections = {
        "Curves": curves,
        "Evaluation": _evaluation(run, record),
        "Attention": _attention(run, record),
        "Settings": [{"rows": _set(settings)}],
        "Versions": [{"rows": _set(record.get("environment", {}))}],
    }
    return {name: parts for name, parts in sections.items() if parts}


def _evaluation(run: Run, record: Mapping[str, Any]) -> list[Part]:
    """Returns what the run's newest report shows, or how to make one."""
    numbered = [
        (int(number[1] or 1), folder)
        for folder in run.folder.glob("report*")
        if (number := re.fullmatch(r"report(?:-(\d+))?", folder.name))
        and (folder / REPORT).is_file()
    ]
    if not numbered and describes_detector(record):
        return [_precisions(run.folder)]
    if not numbered:
        command = f"python main.py -e --resume {run.folder / checkpoint.BEST} {_data(record)}"
        text = "Figures by class, confusions, calibration and the worst images: run"
        return [{"text": text, "command": f"{command} --report"}]
    _, folder = max(numbered)
    summary = read_json(folder / REPORT, "a report of --report")
    numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
    figures = [[name.replace("_", " "), _figure(value)] for name, value in numbers.items()]
    text = f"{summary['images']:,} images of {summary['data']}, by {summary['checkpoint']}."
    parts: list[Part] = [{"text": text, "rows": figures}, *_pictures(folder)]
    for name, heading in TABLES.items():
        if name != "classes" and not (folder / f"{name}.csv").exists():
            continue  # of a detector
        titles, *rows = csv.reader((folder / f"{name}.csv").read_text().splitlines())
        share = re.compile(r"\d+\.\d{4}")
        short = [[f"{float(c):.2f}" if share.fullmatch(c) else c for c in row] for row in rows]
        parts.append({"text": heading, "rows": short, "titles": titles})
    return parts


def _attention(run: Run, record: Mapping[str, Any]) -> list[Part]:
    """Returns the pictures of the run's attention, or how to make them."""
    folder = run.folder / ATTENTION
    if folder.is_dir() or describes_detector(record) or not run.ksize:
        return _pictures(folder)
    best = run.folder / checkpoint.BEST
    command = f"python visualize_attention.py {best} {_data(record)} --output {folder}"
    return [{"text": "ECA's kernels and channel weights: run", "command": command}]


def _precisions(folder: Path) -> Part:
    """Returns a table of a detector's average precision by class, at its best epoch."""
    try:
        newest = checkpoint.CheckpointFolder(folder).newest_good(best_first=True)
    except UserError as error:
        return {"text": str(error)}
    run = newest[0].run if newest else None
    summaries = run.progress.best.get("summaries", {}) if run else {}
    by_class = {kind: summary["per_class"] for kind, summary in summaries.items()}
    names = dict.fromkeys(name for values in by_class.values() for name in values)
    rows = [[name, *(_figure(100 * v.get(name, -1)) for v in by_class.values())] for name in names]
    text = "Average precision in %, at the best epoch; - where there was no object."
    return {"text": text, "titles": ["class", *by_class], "rows": rows}


def _pictures(folder: Path) -> list[Part]:
    return [{"picture": path} for path in sorted(folder.glob("*.png"))]


def _set(values: Mapping[str, Any]) -> list[list[object]]:
    """Returns names and values of what was set, as a reader writes them."""
    switches = {True: "yes", False: "no"}
    named = [(name.replace("_", " "), v) for name, v in values.items() if v is not None and v != []]
    return [
        [name, switches[v] if isinstance(v, bool) else f"{v:,}" if isinstance(v, int) else v]
        for name, v in named
    ]


def _data(record: Mapping[str, Any]) -> object:
    return record.get("args", {}).get("data", "DATA")


def _figure(value: float) -> str:
    """Returns a number with four digits, or a large one whole; - for what is not defined."""
    if not 0 <= value < float("inf"):  # -1: there was no object to detect
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    run_script(main)

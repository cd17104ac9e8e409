"""Writes what is known of a run into one HTML file that needs no other file and no network.

python -m tools.run_report runs/eca_resnet18-1
python -m tools.run_report runs/mask_rcnn_eca_resnet50-1 --output report.html
"""

import base64
import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from tools.compare_runs import RESULTS, Run, first_weights, read_run
from utils.command_line.parser import Parser
from utils.runs import checkpoint
from utils.runs.checkpoint import describes_detector
from utils.system.errors import UserError
from utils.system.faults import run_script
from utils.system.files import check_own_file, write_atomically
from utils.system.text import ksize_text, printable

NAME, REPORT = "report.html", "report.json"
ATTENTION = "attention"  # a folder of visualize_attention.py inside the run's
MARK = "<!-- written by python -m tools.run_report -->"  # what may be replaced by a newer page
WEAKEST, PAIRS, WORST = 10, 20, 24  # rows that are shown of long tables
LARGEST = 50_000_000  # bytes of a file that is read
AP_TITLES = {"bbox": "Box AP", "segm": "Mask AP"}
# The page's own policy forbids scripts, and everything that is not in the file.
TEMPLATE = """<!DOCTYPE html>
{{ mark }}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --text: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --card: #f6f8fa; --link: #0060a0; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --text: #e6edf3;
  --soft: #9198a1; --line: #30363d; --card: #161b22; --link: #4db2ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line);
  column-span: all; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p { max-width: 48rem; margin: .5rem 0; }
a { color: var(--link); display: inline-block; margin-right: .75rem; }
code { background: var(--card); padding: .1em .3em; }
.soft, dt, th { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .75rem; }
dt { font-size: .8125rem; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; text-align: right; vertical-align: top; font-weight: 400;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.word { text-align: left; white-space: normal; min-width: 7rem; max-width: 24rem; }
#Settings { columns: 2 21rem; }
img { display: block; max-width: 100%; background: #fff; border-radius: 8px; }
@media (max-width: 50rem) { img { max-width: 45rem; } }
</style>
</head>
<body>
{%- macro cells(kind, row, words) %}
<tr>{% for cell in row %}<{{ kind }}{% if loop.index <= words %} class="word"{% endif %}>
{{- cell }}</{{ kind }}>{% endfor %}</tr>
{%- endmacro %}
{%- macro table(rows, titles=(), words=1) %}
<div class="scroll"><table>
{%- if titles %}<thead>{{ cells("th", titles, words) }}</thead>{% endif %}<tbody>
{%- for row in rows %}{{ cells("td", row, words) }}{% endfor %}</tbody></table></div>
{%- endmacro %}
{%- macro tiles(facts) %}
<dl>{% for name, value in facts.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}</dl>
{%- endmacro %}
{%- macro picture(path) %}
{%- set address = path|png %}
{%- if address %}
<div class="scroll"><img alt="{{ path.stem|replace('_', ' ') }}" src="{{ address }}"></div>
{%- else %}
<p class="soft">{{ path.name }} is missing, or cannot be read as a PNG picture.</p>
{%- endif %}
{%- endmacro %}
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ about }}</p>
{{- tiles(facts) }}
<nav>{% for name in sections %}
<a href="#{{ name|replace(' ', '-') }}">{{ name }}</a>{% endfor %}</nav>
</header>
<main>
{% for name, parts in sections.items() %}
<section id="{{ name|replace(' ', '-') }}">
<h2>{{ name }}</h2>
{%- for part in parts %}
{%- if part.folded %}<details><summary>{{ part.folded }}</summary>{% endif %}
{%- if part.heading %}<h3>{{ part.heading }}</h3>{% endif %}
{%- if part.text %}<p>{{ part.text }}</p>{% endif %}
{%- if part.command %}<p><code>{{ part.command }}</code></p>
<p>and then this tool again.</p>{% endif %}
{%- if part.facts %}{{ tiles(part.facts) }}{% endif %}
{%- if part.picture %}{{ picture(part.picture) }}{% endif %}
{%- if part.rows %}{{ table(part.rows, part.titles, part.words or 1) }}{% endif %}
{%- if part.folded %}</details>{% endif %}
{%- endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
Part = Mapping[str, Any]  # what the template shows: text, command, picture, rows, titles, …


def main() -> int:
    parser = Parser(prog="python -m tools.run_report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run of main.py or detect_main.py")
    parser.add_argument("--output", metavar="FILE", help=f"default: RUN/{NAME}")
    args = parser.parse_args()
    folder = Path(args.run)
    target = Path(args.output) if args.output else folder / NAME
    run = read_run(folder)
    epochs_fit = all(0 < row["epoch"] < 1e9 for row in run.history)
    if not epochs_fit or not all(isinstance(k, int) for k in run.ksize or ()):
        raise UserError(f"{folder}: metrics.csv or args.json is not what a run writes")
    check_own_file(target, MARK)
    data = page(run, json.loads((folder / "args.json").read_text()))
    write_atomically(target, data)
    print(f"written to {printable(target)} ({len(data) / 1e6:.1f} MB)")
    return 0


def page(run: Run, record: Mapping[str, Any]) -> bytes:
    """Returns the page of a run; all that it shows is escaped, as text and not as HTML.

    Args:
        record: the contents of the run's args.json.
    """
    environment = jinja2.Environment(autoescape=True, finalize=_legible)
    environment.filters["png"] = png_address
    data = _mapping(record, "args").get("data", "")
    best = run.best
    facts: dict[str, object] = {
        title: _figure(column, best[column])
        + ("" if "loss" in column or best[column] < 0 else " %")
        for title, column in RESULTS[run.decides]
        if column in best
    }
    facts |= {"best epoch": f"{best['epoch']:.0f}", "epochs": f"{len(run.history)} of {run.epochs}"}
    facts |= {"parameters": record.get("parameters"), "training images": record.get("train_images")}
    return (
        environment.from_string(TEMPLATE)
        .render(
            mark=Markup(MARK),
            title=run.folder.resolve().name,
            about=f"{run.arch} on {data}" if data else run.arch,
            facts={name: _thousands(v) for name, v in facts.items() if v is not None},
            sections=_sections(run, record),
        )
        .encode()
    )


def _legible(value: object) -> object:
    """Returns a value as the page shows it: control characters as \\xNN."""
    return value if isinstance(value, Markup) else printable(value)


def _sections(run: Run, record: Mapping[str, Any]) -> dict[str, list[Part]]:
    columns = list(run.history[0])
    epochs = [[_figure(c, row.get(c, math.nan)) for c in columns] for row in run.history]
    curves: list[Part] = [{"picture": run.folder / "curves.png"}]
    curves.append({"folded": f"Every epoch ({len(epochs)})", "rows": epochs, "titles": columns})
    recipe, args = _mapping(record, "recipe"), _mapping(record, "args")
    flags = args | {name: record.get(name) for name in ("seed", "train_digest")}
    flags = {name: value for name, value in flags.items() if name not in recipe}
    return {
        "Curves": curves,
        **_evaluation(run, record),
        "Network": _network(run, record),
        "Settings": [
            {"heading": "Recipe", "rows": _settings(recipe), "words": 2},
            {"heading": "Flags", "rows": _settings(flags), "words": 2},
        ],
        "Versions": [{"rows": _settings(_mapping(record, "environment")), "words": 2}],
    }


def _evaluation(run: Run, record: Mapping[str, Any]) -> dict[str, list[Part]]:
    """Returns the sections on classes and images: of the newest report, or of a detector."""
    if (report := newest_report(run.folder)) is not None:
        return report_sections(report)
    if describes_detector(record):
        drawn = run.folder / "predictions.png"
        return {"Classes": [_precisions(run.folder)], "Detections": [{"picture": drawn}]}
    command = f"python main.py -e --resume {run.folder / checkpoint.BEST} {_data(record)} --report"
    text = "Figures by class, confusions, calibration and the worst images: run"
    return {"Classes": [{"text": text, "command": command}]}


def newest_report(run: Path) -> Path | None:
    """Returns the run's finished report with the highest number; None if there is none."""
    numbered = [
        (int(number[1] or 1), folder)
        for folder in run.glob("report*")
        if (number := re.fullmatch(r"report(?:-(\d{1,9}))?", folder.name))
        and not folder.is_symlink()
        and (folder / REPORT).is_file()
    ]
    return max(numbered)[1] if numbered else None


def report_sections(folder: Path) -> dict[str, list[Part]]:
    """Returns the sections on classes, confusions, calibration and the worst images.

    Raises:
        UserError: a file of the report is missing, or is not what main.py writes.
    """
    try:
        told = json.loads(read_inside(folder / REPORT))
        shares = ("top1", "top5", "mean_recall", "mean_precision", "mean_f1")
        facts = {name.replace("_", " "): _percent(told[name]) for name in shares}
        classes = _table(folder / "classes.csv")
        pairs = _table(folder / "confused_pairs.csv", words=2)
        worst = _table(folder / "worst_images.csv", words=4)
        place = classes["titles"].index("f1")
        weakest = sorted(classes["rows"], key=lambda row: float(row[place].replace("-", "inf")))
        heading = f"The {WEAKEST} classes with the lowest F1, in %"
        by_class: list[Part] = [{**classes, "heading": "Each class, in %"}]
        if len(weakest) > WEAKEST:
            by_class = [{**classes, "rows": weakest[:WEAKEST], "heading": heading}]
            by_class.append({**classes, "folded": f"All {len(weakest):,} classes"})
        text = f"{told['images']:,} images of {told['data']}, by {told['checkpoint']}."
        error, sure = (_percent(told[name]) for name in ("calibration_error", "mean_confidence"))
        sentence = (
            f"Expected calibration error {error} over {told['calibration_bins']} bins; mean "
            f"confidence {sure}, right answers {_percent(told['top1'])}."
        )
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make the report anew") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, csv.Error):
        raise UserError(
            f"{folder}: holds files that main.py --report does not write; move it away, or make "
            "the report anew"
        ) from None
    most = "Most confused pairs" if pairs["rows"] else "No image was taken for another class"
    named = "Red: another class was predicted. Wrong labels are often among these images."
    return {
        "Classes": [{"text": text, "facts": facts}, *by_class],
        "Confusions": [
            {"picture": folder / "confusion.png"},
            {**pairs, "heading": most, "rows": pairs["rows"][:PAIRS]},
        ],
        "Calibration": [{"text": sentence, "picture": folder / "calibration.png"}],
        "Worst images": [
            {"text": named, "picture": folder / "worst_images.png"},
            {**worst, "rows": worst["rows"][:WORST], "folded": "The same as a table"},
        ],
    }


def _table(path: Path, words: int = 1) -> dict[str, Any]:
    """Returns the rows of a report's CSV file, numbers with two decimals, and its titles."""
    titles, *rows = csv.reader(io.StringIO(read_inside(path).decode()))
    shown = [i for i, title in enumerate(titles) if not title.endswith("number")]
    named = [titles[i].replace("_", " ") for i in shown]
    return {
        "titles": named,
        "rows": [
            [row[i] if place < words else _short(row[i]) for place, i in enumerate(shown)]
            for row in rows
        ],
        "words": words,
    }


def _precisions(folder: Path) -> Part:
    """Returns a table of a detector's average precision by class, at its best epoch."""
    try:
        newest = checkpoint.CheckpointFolder(folder).newest_good(best_first=True)
    except UserError as error:
        return {"text": str(error)}
    saved = newest[1] if newest else {}
    summaries = _mapping(_mapping(_mapping(saved, "progress"), "best"), "summaries")
    by_class = [_mapping(_mapping(summaries, kind), "per_class") for kind in summaries]
    names = list(dict.fromkeys(name for values in by_class for name in values))
    if not names:
        return {"text": f"{folder}: no checkpoint holds AP by class."}
    titles = ["Class", *(AP_TITLES.get(kind, kind) for kind in summaries)]
    rows = [[name, *(_share(values.get(name)) for values in by_class)] for name in names]
    text = "Average precision in %, at the best epoch; - where there was no object."
    return {"text": text, "titles": titles, "rows": rows}


def _network(run: Run, record: Mapping[str, Any]) -> list[Part]:
    classes = record.get("classes")
    facts = {
        "network": run.arch,
        "attention": record.get("attention", "-"),
        "kernel sizes": ksize_text(run.ksize),
        "parameters": record.get("parameters"),
        "classes": len(classes) if isinstance(classes, list) else record.get("num_classes"),
        "first weights": ", ".join(first_weights(dict(record)).values()) or "random",
    }
    parts: list[Part] = [{"rows": _settings(facts), "words": 2}]
    folder = run.folder / ATTENTION
    if folder.is_dir() and not folder.is_symlink():
        names = ("channel_weights", "spread", "kernels")
        return parts + [{"picture": folder / f"{name}.png"} for name in names]
    if run.ksize and not describes_detector(record):
        best = run.folder / checkpoint.BEST
        command = f"python visualize_attention.py {best} {_data(record)} --output {folder}"
        parts.append({"text": "ECA's kernels and channel weights: run", "command": command})
    return parts


def png_address(path: Path) -> str:
    """Returns a PNG file as an address that holds it all; "" for a file that is none."""
    try:
        data = read_inside(path)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
    except Exception:  # what a damaged file makes Pillow raise is open-ended
        return ""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def read_inside(path: Path) -> bytes:
    """Returns a file's bytes. No link is followed: the folder may be one that a stranger packed.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is too large.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{path} is too large")
    return data


def _mapping(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a part of a file's contents; empty where it is missing or no mapping."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _settings(values: Mapping[str, Any]) -> list[list[object]]:
    """Returns the settings that were set, as a reader writes them."""
    switches = {True: "yes", False: "no"}
    return [
        [name.replace("_", " "), switches[v] if isinstance(v, bool) else _thousands(v)]
        for name, v in values.items()
        if v is not None and v != []
    ]


def _data(record: Mapping[str, Any]) -> object:
    return _mapping(record, "args").get("data", "DATA")


def _thousands(value: object) -> object:
    return f"{value:,}" if isinstance(value, int) else value


def _percent(value: object) -> str:
    return f"{value:.2f} %" if isinstance(value, int | float) else "-"


def _share(value: object) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) and value >= 0 else "-"


def _short(value: str) -> str:
    """Returns a number of a CSV file with two decimals; "-" for an empty cell."""
    return f"{float(value):.2f}" if "." in value else value or "-"


def _figure(column: str, value: float) -> str:
    """Returns a number of metrics.csv: a whole epoch, a loss with four digits, others with two."""
    if not math.isfinite(value) or value < 0:  # -1: there was no object to detect
        return "-"
    digits = {"epoch": ".0f", "lr": ".4g"}.get(column, ".4f" if "loss" in column else ".2f")
    return f"{value:{digits}}"


if __name__ == "__main__":
    run_script(main)

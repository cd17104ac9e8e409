"""Compares training runs: a table of results, one of what differs, and a picture of the curves.

python -m tools.compare_runs runs/eca_resnet18-1 runs/resnet18-1
python -m tools.compare_runs runs/* --output results/digits
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.command_line.parser import Parser
from utils.runs import folder as run_folder
from utils.system.errors import UserError
from utils.system.faults import run_script
from utils.system.files import check_free, read_json, read_text, write_atomically
from utils.system.style import CURVES, png, styled
from utils.system.text import cell, columns, csv_text, ksize_text, printable, short

# The figure that decides which epoch is the best, and what is shown of that epoch.
RESULTS = {
    "val_top1": (("top-1", "val_top1"), ("top-5", "val_top5"), ("val loss", "val_loss")),
    "mask_AP": (("mask AP", "mask_AP"), ("mask AP50", "mask_AP50"), ("box AP", "box_AP")),
    "box_AP": (("box AP", "box_AP"), ("box AP50", "box_AP50"), ("box AP75", "box_AP75")),
}
PANELS = {
    "val_top1": ("val_top1", "val_loss", "train_top1", "train_loss"),
    "mask_AP": ("mask_AP", "mask_AP50", "box_AP", "train_loss"),
    "box_AP": ("box_AP", "box_AP50", "box_AP75", "train_loss"),
}
# Of args.json, what does not make two runs different experiments, or is shown by itself.
UNTOLD = {"arch", "ksize", "epochs", "classes", "environment", "action", "print_freq", "workers"}
UNTOLD |= {"worker_timeout", "save_every", "save_minutes", "num_classes", "report", "log"}
RUNS = "folders of runs"


@dataclass(frozen=True)
class Run:
    """Holds one run folder."""

    folder: Path
    arch: str
    ksize: tuple[int, ...] | None
    epochs: int  # planned
    history: list[dict[str, float]]  # one row a finished epoch, "epoch" from 1
    settings: dict[str, str] = field(default_factory=dict)  # what may differ from run to run
    images: str = ""  # names those of the training

    @property
    def decides(self) -> str:
        return next(name for name in RESULTS if any(name in row for row in self.history))

    @property
    def best(self) -> dict[str, float]:
        """Returns the row of `best.pth`: the first with the best figure of --best-by.

        With a validation loss that is not finite no epoch is the best.
        """
        deciding = (self.decides, "val_loss")
        evaluated = [row for row in self.history if self.decides in row]
        finite = [row for row in evaluated if all(math.isfinite(row.get(k, 0.0)) for k in deciding)]
        by = self.settings.get("best_by", "top1")
        figure = f"val_{by}" if by != "top1" else self.decides
        best = min if by == "loss" else max
        return best(finite or evaluated, key=lambda row: row[figure])


def read_run(folder: Path) -> Run:
    """Reads a run folder's metrics.csv and args.json."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(folder / "metrics.csv", RUNS))))
        # An epoch without an evaluation has blank cells.
        history = [{name: float(value) for name, value in row.items() if value} for row in rows]
        if history and history[0]["epoch"] == 0:  # of a run from before epochs counted from 1
            history = [{**row, "epoch": row["epoch"] + 1} for row in history]
        saved = read_json(folder / "args.json", RUNS)
        settings = {**saved.get("args", {}), **saved.get("recipe", {})}
        if "recipe" in settings and not settings["recipe"]:
            settings["recipe"] = "paper"  # no --recipe was named
        settings |= {k: saved[k] for k in ("attention", "seed", "train_images") if k in saved}
        settings |= saved.get("model_kwargs") or {}
        settings |= first_weights(saved)
        arch = "/".join(filter(None, (saved["arch"], saved.get("backbone"))))
        ksize = tuple(saved["ksize"]) if saved.get("ksize") else None
        told = {k: str(v) for k, v in settings.items() if k not in UNTOLD}
        images = saved.get("train_digest") or f"{told.get('data')} {told.get('train_images')}"
        run = Run(folder, arch, ksize, saved["recipe"]["epochs"], history, told, images)
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error):
        raise UserError(f"{folder}: metrics.csv or args.json is not what a run writes") from None
    if not history:
        raise UserError(f"{folder}: no epoch is finished yet")
    if not any(name in row for row in history for name in RESULTS):
        raise UserError(f"{folder}: metrics.csv has none of {', '.join(RESULTS)}")
    return run


def first_weights(saved: dict) -> dict[str, str]:
    """Returns where a run's first weights came from, as saved or as a detector's command says."""
    if saved.get("pretrained"):
        return {"pretrained": saved["pretrained"]}
    command = saved.get("environment", {}).get("command", "")
    pattern = r"--(pretrained|backbone-weights|detector-weights)[ =]('[^']*'|\S+)"
    return {flag.replace("-", "_"): file for flag, file in re.findall(pattern, command)}


def short_names(runs: Sequence[Run]) -> list[str]:
    """Returns the folders' last names where these differ for all runs, else the whole paths."""
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns {setting: its value in each run} for those that are not the same in all of them."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name, "-") for run in runs] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def result_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the table of results, titles first, differing settings in the last columns."""
    shown = RESULTS[runs[0].decides]
    differing = differences(runs)
    titles = ["run", "network", "ksize", "epochs", *(title for title, _ in shown), "at epoch"]
    rows = [[*titles, *differing]]
    for i, (name, run) in enumerate(zip(short_names(runs), runs, strict=True)):
        best = run.best
        figures = [f"{best[c]:.4f}" if "loss" in c else f"{best[c]:.2f}" for _, c in shown]
        epochs = f"{len(run.history)}/{run.epochs}"
        settings = [values[i] for values in differing.values()]
        row = [name, run.arch, ksize_text(run.ksize), epochs, *figures, f"{best['epoch']:.0f}"]
        rows.append(row + settings)
    return rows


def setting_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the table of settings that differ, one row each and one column a run; [] for none."""
    rows = [[name, *values] for name, values in differences(runs).items()]
    return [["setting", *short_names(runs)], *rows] if rows else []


def csv_rows(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns the table as cells of a CSV file; what is no number is made safe for spreadsheets."""
    number = re.compile(r"-|[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|-?inf")
    return [[v if number.fullmatch(v) else cell(v) for v in row] for row in rows]


def repeat_lines(runs: Sequence[Run]) -> list[str]:
    """Returns mean and standard deviation of runs that differ in nothing but their seed."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        rest = tuple(sorted((k, v) for k, v in run.settings.items() if k != "seed"))
        groups.setdefault((run.arch, run.ksize, run.epochs, rest), []).append(run)
    lines = []
    for members in groups.values():
        if len(members) > 1:
            run, values = members[0], [run.best[run.decides] for run in members]
            seeds = {run.settings.get("seed") for run in members}
            mean, std = statistics.mean(values), statistics.stdev(values)
            what = "seeds" if len(seeds) == len(members) else "runs"
            lines.append(
                f"{run.arch} {ksize_text(run.ksize)}: {RESULTS[run.decides][0][0]} {mean:.2f} ± "
                f"{std:.2f} over {len(values)} {what} ({', '.join(short_names(members))})"
            )
    return lines


def draw(runs: Sequence[Run]) -> bytes:
    """Draws one panel a figure and one curve a run. Returns a PNG."""
    from matplotlib.ticker import MaxNLocator

    decides = runs[0].decides
    with styled() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(9, 6.6))
        for axis, column in zip(axes.flat, PANELS[decides], strict=True):
            for i, (name, run) in enumerate(zip(short_names(runs), runs, strict=True)):
                points = [row for row in run.history if math.isfinite(row.get(column, math.nan))]
                x, y = [row["epoch"] for row in points], [row[column] for row in points]
                style = ("-", "--", ":", "-.")[i // len(CURVES) % 4]
                colour = CURVES[i % len(CURVES)]
                look = {"ms": 3, "color": colour, "label": short(name, 60), "clip_on": False}
                axis.plot(x, y, style, marker="o", **look)
            axis.set(title=panel_title(column), xlabel="Epoch")
            if column.endswith("loss"):
                axis.set_yscale("log")
            else:
                axis.set_ylim(top=min(100.0, axis.get_ylim()[1]))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        across = max(1, min(4, len(runs), 110 // (8 + max(map(len, labels)))))
        figure.legend(handles, labels, loc="outside lower center", ncols=across)
        return png(figure)


def panel_title(column: str) -> str:
    """Says what a column of metrics.csv holds: val_top1 → "Validation top-1 (%)"."""
    part, _, what = column.partition("_")
    what = {"top1": "top-1 (%)", "loss": "loss"}.get(what, f"{what} (%)")
    whole = {"val": "Validation", "train": "Training"}.get(part, part.capitalize())
    return f"{whole} {what}"


def main() -> int:
    parser = Parser(prog="python -m tools.compare_runs", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--output", metavar="DIR", help="default: runs/comparison-N, a new folder")
    args = parser.parse_args()
    check_free(args.output)
    runs = []
    for folder in dict.fromkeys(map(Path, args.runs)):
        if folder.is_dir() and not (folder / "metrics.csv").exists():
            print(f"! {folder}: has no metrics.csv; passed over")
        else:
            runs.append(read_run(folder))
    if not runs:
        raise UserError("no run to compare; give folders that main.py wrote, such as runs/*")
    kinds = {run.decides for run in runs}
    if len(kinds) > 1:
        what = ", ".join(sorted(kinds))
        raise UserError(f"the runs measure different things ({what}); compare like with like")
    rows = result_rows(runs)
    settings = setting_rows(runs)
    results = [row[: len(row) - len(settings[1:])] for row in rows]
    for table, left in ((results, 2), (settings, 1)):
        if table:
            print(columns([[*map(printable, row)] for row in table], left, gap=3), end="\n\n")
    if len({run.images for run in runs}) > 1:
        print("! the runs differ in their training images, too\n")
    if repeats := repeat_lines(runs):
        print(*map(printable, repeats), "", sep="\n")
    folder = run_folder.create("comparison", args.output)
    write_atomically(folder / "comparison.csv", csv_text(csv_rows(rows)).encode())
    write_atomically(folder / "comparison.png", draw(runs))
    print(f"written to {folder}: comparison.csv, comparison.png")
    return 0


if __name__ == "__main__":
    run_script(main)

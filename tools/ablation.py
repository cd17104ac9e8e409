"""The paper's ablation as one command: every attention, several seeds, one table, one picture.

python -m tools.ablation demo:digits
python -m tools.ablation DATA -a resnet50 --seeds 1 --output DIR -- --amp bf16 --channels-last

What follows -- goes to main.py as it is. Runs stand in DIR, one folder each; a command that was
interrupted goes on where it stopped when it is given again with the same --output DIR.
"""

import csv
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tools.compare_runs import read_run
from utils.options.parser import Parser, positive_int, run_script
from utils.runs import folder as run_folder
from utils.system import output_checks
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.processes import processors
from utils.system.text import columns, did_you_mean

MAIN = Path(__file__).resolve().parent.parent / "main.py"
KERNELS = (1, 3, 5, 7, 9)  # of the paper's figure on k
PLAIN = "none"
# Student's t: its 97.5 % quantile by degrees of freedom, from 1, so that 95 % lie between -t and t;
# as in the NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
STUDENT_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


@dataclass(frozen=True)
class Variant:
    """One row of the ablation: what main.py is asked for, with {} for the plain network's name."""

    arch: str
    flags: tuple[str, ...] = ()


VARIANTS: Mapping[str, Variant] = {
    PLAIN: Variant("{}"),
    "SE": Variant("se_{}"),
    "SE-Var1": Variant("eca_{}", ("--attention", "se_var1")),
    "SE-Var2": Variant("eca_{}", ("--attention", "se_var2")),
    "SE-Var3": Variant("eca_{}", ("--attention", "se_var3")),
    "ECA-NS k=3": Variant("eca_{}", ("--attention", "eca_ns", "--ksize", "3333")),
    **{f"ECA k={k}": Variant("eca_{}", ("--ksize", str(k) * 4)) for k in KERNELS},
    "ECA adaptive": Variant("eca_{}", ("--ksize", "adaptive")),
}
USUAL = [name for name in VARIANTS if not name.startswith("SE-Var")]


@dataclass(frozen=True)
class Result:
    """Best top-1 in % of each seed's run, in the order of the seeds."""

    name: str
    top1: tuple[float, ...]
    parameters: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        """Of the runs, about their mean; nan for a single one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else math.nan


def gain(result: Result, plain: Result) -> tuple[float, float]:
    """Mean of the differences to the plain network, seed by seed, and its standard error.

    Seeds are paired because a seed fixes the order and the augmentation of the images for both.
    """
    each = [a - b for a, b in zip(result.top1, plain.top1, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return statistics.fmean(each), error


def stands_out(result: Result, plain: Result) -> bool:
    """Whether 0 is outside of the gain's 95 % confidence interval, by Student's t."""
    mean, error = gain(result, plain)
    freedom = len(result.top1) - 1
    if freedom < 1:
        return False
    return abs(mean) > STUDENT_T[min(freedom, len(STUDENT_T)) - 1] * error


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table, its titles first. A gain that stands out is marked with a star."""
    table = [["attention", "parameters", "top-1", "± std", "gain", "± error", "runs"]]
    plain = next((r for r in results if r.name == PLAIN), None)
    for r in results:
        cells = ["-", "-"]
        if plain is not None and r is not plain:
            mean, error = gain(r, plain)
            cells = [f"{mean:+.2f}{'*' if stands_out(r, plain) else ''}", _figure(error)]
        table.append(
            [r.name, f"{r.parameters:,}", f"{r.mean:.2f}", _figure(r.std), *cells, str(len(r.top1))]
        )
    return table


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def draw(results: Sequence[Result], title: str) -> bytes:
    """A PNG: every attention with its runs, and top-1 over the kernel size."""
    from matplotlib import pyplot as plt

    from utils.inspection.pictures import png

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, r in enumerate(results):
        left.plot(r.top1, [i] * len(r.top1), "o", color="#7f7f7f", markersize=4, alpha=0.6)
        left.errorbar(r.mean, i, xerr=_bar(r), fmt="D", color="#0b5fa5", capsize=4)
    left.set_yticks(range(len(results)), [r.name for r in results])
    left.invert_yaxis()
    left.set_xlabel("top-1 (%): each run, mean ± std")
    by_name = {r.name: r for r in results}
    swept = [(k, by_name[f"ECA k={k}"]) for k in KERNELS if f"ECA k={k}" in by_name]
    for i, (k, r) in enumerate(swept):
        right.errorbar(
            k,
            r.mean,
            yerr=_bar(r),
            fmt="D",
            color="#0b5fa5",
            capsize=4,
            label="" if i else "ECA, one k in all stages",
        )
    right.plot([k for k, _ in swept], [r.mean for _, r in swept], color="#0b5fa5", linewidth=1)
    for name, colour, style in (
        ("ECA adaptive", "#2e8b57", "--"),
        ("SE", "#e08e0b", "-."),
        (PLAIN, "#d1495b", ":"),
    ):
        if name in by_name:
            right.axhline(by_name[name].mean, color=colour, linestyle=style, label=name)
    right.set_xticks(KERNELS)
    right.set_xlabel("kernel size k")
    right.set_ylabel("top-1 (%)")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3, linewidth=0.5)
    figure.suptitle(title, fontsize=11)
    return png(figure, colours=256)


def _bar(result: Result) -> float | None:
    return None if math.isnan(result.std) else result.std


def run_all(
    commands: Mapping[Path, Sequence[str]], jobs: int, environment: Mapping[str, str]
) -> None:
    """Runs the commands, `jobs` at a time; each writes to FOLDER.log.

    Raises:
        UserError: one of them failed; the others under way are asked to stop, and save.
    """
    waiting, running = deque(commands.items()), {}
    bar = tqdm(total=len(commands), unit="run", disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder, command = waiting.popleft()
                with open(folder.with_name(folder.name + ".log"), "ab") as log:
                    running[folder] = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
            ended = [folder for folder, process in running.items() if process.poll() is not None]
            if not ended:
                time.sleep(0.5)
            for folder in ended:
                if running.pop(folder).returncode:
                    log = folder.with_name(folder.name + ".log")
                    raise UserError(f"{folder.name} failed ({log}): {_reason(log)}", EXIT_FAILED)
                bar.update()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()


def _reason(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if "error" in line), lines[-1])


def command_of(
    variant: Variant, data: str, arch: str, seed: int, folder: Path, extra: Sequence[str]
) -> list[str]:
    return [
        sys.executable,
        str(MAIN),
        data,
        "-a",
        variant.arch.format(arch),
        *variant.flags,
        "--seed",
        str(seed),
        "--output",
        str(folder),
        "--resume",
        "auto",
        *extra,
    ]


def collect(folders: Mapping[str, Sequence[Path]]) -> list[Result]:
    """The results of finished runs: {variant: a folder a seed}."""
    results = []
    for name, of_seeds in folders.items():
        top1 = tuple(read_run(folder).best["val_top1"] for folder in of_seeds)
        saved = json.loads((of_seeds[0] / "args.json").read_text())
        results.append(Result(name, top1, saved["parameters"]))
    return results


def main() -> int:
    own, extra = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, extra = own[:cut], own[cut + 1 :]
    parser = Parser(prog="python -m tools.ablation", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="as main.py takes it")
    parser.add_argument(
        "-a", "--arch", default="resnet18", metavar="NAME", help="plain ResNet (default: resnet18)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        default=USUAL,
        help=f"of: {', '.join(VARIANTS)} (default: all but SE-Var)",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="runs at a time; each takes its share of the CPU's threads (default: 1)",
    )
    parser.add_argument("--output", metavar="DIR", help="default: runs/ablation-N, a new folder")
    args = parser.parse_args(own)
    for name in args.variants:
        if name not in VARIANTS:
            raise UserError(f"no variant {name!r}{did_you_mean(name, VARIANTS)}: see --help")

    root = open_root(args.output)
    names = [name for name in VARIANTS if name in args.variants]
    folders = {
        name: [root / f"{name.replace(' ', '_')}_seed{s}" for s in range(args.seeds)]
        for name in names
    }
    # Seed by seed, so that what is there early holds every variant.
    commands = {
        folders[name][seed]: command_of(
            VARIANTS[name], args.data, args.arch, seed, folders[name][seed], extra
        )
        for seed in range(args.seeds)
        for name in names
    }
    environment = dict(os.environ)
    if args.jobs > 1:
        threads = max(1, processors() // args.jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    print(f"{len(commands)} runs of {args.arch} with {', '.join(names)}; logs and runs: {root}")
    run_all(commands, args.jobs, environment)

    results = collect(folders)
    table = rows(results)
    print(columns(table, left=1))
    print("top-1: of each run's best epoch, chosen on the same validation images")
    print("gain: over none, seed by seed, with its standard error; * 95 % interval without 0")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    write_atomically(root / "ablation.csv", text.getvalue().encode())
    seeds = f"{args.seeds} seeds" if args.seeds > 1 else "1 seed"
    write_atomically(root / "ablation.png", draw(results, f"{args.arch} on {args.data}, {seeds}"))
    print(f"written to {root}: ablation.csv, ablation.png")
    return 0


def open_root(output: str | None) -> Path:
    """The folder of all runs; one of an ablation before is taken up again."""
    mark = ".ablation"
    if output is not None and (Path(output) / mark).exists():
        return Path(output)
    output_checks.check_free(output)
    root = run_folder.create("ablation", output)
    (root / mark).touch()
    return root


if __name__ == "__main__":
    run_script(main)

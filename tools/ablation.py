"""The paper's ablation as one command: every attention, several seeds, one table, one picture.

python -m tools.ablation demo:digits
python -m tools.ablation DATA -a resnet50 --seeds 1 --output DIR -- --amp bf16 --channels-last

What follows -- goes to main.py as it is. Runs stand in DIR, one folder each; a command that was
interrupted goes on where it stopped when it is given again with the same --output DIR.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import csv
import io
import json
import os
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
from utils.study.ablation_results import KERNELS, PLAIN, Result, draw, rows
from utils.system import output_checks
from utils.system.cpu_share import processors
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.text import columns, did_you_mean

MAIN = Path(__file__).resolve().parent.parent / "main.py"


@dataclass(frozen=True)
class Variant:
    """Holds one row of the ablation: main.py's flags, with {} for the plain network's name."""

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
    """Returns the results of finished runs: {variant: a folder for each seed}."""
    results = []
    for name, of_seeds in folders.items():
        top1 = tuple(read_run(folder).best["val_top1"] for folder in of_seeds)
        saved = json.loads((of_seeds[0] / "args.json").read_text())
        results.append(Result(name, top1, saved["parameters"]))
    return results


def build_parser() -> Parser:
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
    return parser


def main() -> int:
    own, extra = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, extra = own[:cut], own[cut + 1 :]
    args = build_parser().parse_args(own)
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
    seeds = f"{args.seeds} seeds" if args.seeds > 1 else "1 seed"
    write_results(root, collect(folders), f"{args.arch} on {args.data}, {seeds}")
    return 0


def write_results(root: Path, results: Sequence[Result], title: str) -> None:
    """Prints the table, and writes the picture and a row for each run to `root`."""
    print(columns(rows(results), left=1))
    print("top-1: of each run's best epoch, chosen on the same validation images")
    print("gain: over none, seed by seed, with its standard error; * 95 % interval without 0")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("attention", "parameters", "seed", "top1"))
    for result in results:
        writer.writerows(
            (result.name, result.parameters, seed, f"{top1:.4f}")
            for seed, top1 in enumerate(result.top1)
        )
    write_atomically(root / "ablation.csv", text.getvalue().encode())
    write_atomically(root / "ablation.png", draw(results, title))
    print(f"written to {root}: ablation.csv, ablation.png")


def open_root(output: str | None) -> Path:
    """Returns the folder of all runs; the folder of an earlier ablation is continued."""
    mark = ".ablation"
    if output is not None and (Path(output) / mark).exists():
        return Path(output)
    output_checks.check_free(output)
    root = run_folder.create("ablation", output)
    (root / mark).touch()
    return root


if __name__ == "__main__":
    run_script(main)

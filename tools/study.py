"""A study by plan: rates chosen on validation images, every variant judged once on test images.

python -m tools.study tools/study_plans/fashion.json --output runs/fashion --jobs 2
python -m tools.study tools/study_plans/fashion.json --output runs/fashion --results results/fashion

The plan is a JSON file, written before the first run (docs/EVIDENCE.md has its fields). Runs stand
in DIR, one folder each; a command that was interrupted goes on where it stopped when it is given
again with the same --output DIR, and refuses a plan that was changed since.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import csv
import io
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import models
from tools.ablation import MAIN, run_all
from tools.compare_runs import read_run
from utils.cost.classifier_cost import multiply_adds
from utils.data import demo_sets
from utils.options.parser import Parser, count, positive_int, run_script
from utils.runs import folder as run_folder
from utils.study import parts, pictures, results, tables
from utils.study.plan import Plan, arch_and_flags, read_plan
from utils.study.results import RunResult
from utils.system import output_checks
from utils.system.cpu_share import processors
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.text import columns

PLAN = "plan.json"  # the copy in a study's folder, and the mark of one
SPEED = re.compile(r"^epoch .*  ([\d,]+) images/s", re.MULTILINE)
Spec = tuple[str, str, float, int]  # network, variant, rate, seed


def run_name(spec: Spec) -> str:
    """Returns the folder's name of a run."""
    network, variant, rate, seed = spec
    return f"{network}_{variant.replace(' ', '_')}_lr{rate:g}_seed{seed}"


def choosing(plan: Plan) -> list[Spec]:
    """Returns the runs that choose the learning rates."""
    return [
        (network, variant, rate, seed)
        for seed in plan.choosing_seeds
        for network, how in plan.networks.items()
        for variant in plan.variants
        for rate in how.rates
    ]


def judged(plan: Plan, rates: Mapping[results.Key, float]) -> list[Spec]:
    """Returns the runs that the test images judge, seed by seed."""
    return [
        (network, variant, rates[network, variant], seed)
        for seed in plan.seeds
        for network in plan.networks
        for variant in plan.variants
    ]


def train(
    specs: Sequence[Spec], plan: Plan, folder: Path, machine: Sequence[str], jobs: int
) -> None:
    """Trains those of the runs that are not finished yet."""
    commands = {}
    for spec in specs:
        network, variant, rate, seed = spec
        place = folder / "runs" / run_name(spec)
        if is_finished(place):
            continue
        arch, flags = arch_and_flags(network, variant)
        commands[place] = [sys.executable, str(MAIN), str(folder / "data"), "-a", arch, *flags]
        commands[place] += ["--lr", f"{rate:g}", "--seed", str(seed), *plan.networks[network].flags]
        commands[place] += ["--output", str(place), "--resume", "auto", *machine]
    print(f"training: {len(commands)} of {len(specs)} runs are to be done", flush=True)
    (folder / "runs").mkdir(exist_ok=True)
    run_all(commands, jobs, threads(jobs))


def judge(
    specs: Sequence[Spec], root: Path, folder: Path, machine: Sequence[str], jobs: int
) -> None:
    """Evaluates each run's best epoch on root/val, where that is not done yet."""
    commands = {}
    for name in map(run_name, specs):
        place = folder / "judged" / name
        if not (place / "evaluation.json").exists():
            best = folder / "runs" / name / "best.pth"
            commands[place] = [sys.executable, str(MAIN), str(root), "-e", "--resume", str(best)]
            commands[place] += ["--output", str(place), *machine]
    print(f"judging: {len(commands)} of {len(specs)} runs are to be done", flush=True)
    (folder / "judged").mkdir(exist_ok=True)
    run_all(commands, jobs, threads(jobs))


def threads(jobs: int) -> dict[str, str]:
    """Returns the environment of a run that shares the CPU with jobs - 1 others."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, processors() // jobs)))
    return environment


def is_finished(place: Path) -> bool:
    """Returns whether a run has done all of its epochs."""
    if not (place / "metrics.csv").exists():
        return False
    run = read_run(place)
    return len(run.history) >= run.epochs


def collect(specs: Sequence[Spec], folder: Path) -> list[RunResult]:
    """Reads the results of the runs, each once.

    Raises:
        UserError: a run has written no speed, or diverged in every epoch.
    """
    return [_result(spec, folder) for spec in dict.fromkeys(specs)]


def _result(spec: Spec, folder: Path) -> RunResult:
    network, variant, rate, seed = spec
    name = run_name(spec)
    place = folder / "runs" / name
    run, saved = read_run(place), json.loads((place / "args.json").read_text())
    speeds = SPEED.findall(place.with_name(f"{name}.log").read_text(errors="replace"))
    if not speeds:
        raise UserError(f"{place}.log: tells no speed; remove {place} to train anew", EXIT_FAILED)
    speed = statistics.median(float(text.replace(",", "")) for text in speeds)
    test, file = {}, folder / "judged" / name / "evaluation.json"
    if file.exists():
        test = json.loads(file.read_text())
    return RunResult(
        name=name,
        network=network,
        variant=variant,
        rate=rate,
        seed=seed,
        epochs=run.epochs,
        best_epoch=int(run.best["epoch"]),
        val_top1=run.best["val_top1"],
        test_top1=test.get("top1"),
        test_images=test.get("images"),
        train_images=saved["train_images"],
        seconds_per_epoch=round(saved["train_images"] / max(speed, 1), 3),
        parameters=saved["parameters"],
        multiply_adds=_multiply_adds(spec, len(saved["classes"]), saved["img_size"]),
        environment=saved["environment"],
    )


def _multiply_adds(spec: Spec, classes: int, img_size: int) -> int:
    arch, flags = arch_and_flags(*spec[:2])
    given = dict(itertools.pairwise(flags))
    with torch.device("meta"):
        network = models.create_model(
            arch,
            ksize=given.get("--ksize"),
            num_classes=classes,
            **({"attention": given["--attention"]} if "--attention" in given else {}),
        )
        return multiply_adds(network.eval(), torch.empty(1, 3, img_size, img_size))[""]


def write_results(
    plan: Plan, folder: Path, target: Path, rates: Mapping, runs: Sequence[RunResult]
) -> None:
    """Writes the plan, the CSV of every run and of every epoch, the tables and the pictures."""
    comparisons = results.compare_all(plan, runs)
    text = tables.report(plan, runs, rates, comparisons)
    choices = columns(tables.choice_rows(plan, runs, rates), left=2)
    files = {
        PLAN: (folder / PLAN).read_bytes(),
        "runs.csv": results.runs_csv(runs),
        "epochs.csv": _epochs_csv(runs, folder),
        "choices.txt": f"{choices}\n".encode(),
        "table.txt": f"{text}\n".encode(),
        "accuracy.png": pictures.draw_accuracy(plan, runs, comparisons),
        "cost.png": pictures.draw_costs(plan, runs),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(target / name, data)
    print(text)
    print(f"written to {target}: {', '.join(files)}")


def _epochs_csv(runs: Sequence[RunResult], folder: Path) -> bytes:
    text = io.StringIO()
    writer = None
    for run in runs:
        for row in read_run(folder / "runs" / run.name).history:
            writer = writer or csv.DictWriter(text, ["run", *row], lineterminator="\n")
            if not text.tell():
                writer.writeheader()
            writer.writerow({"run": run.name, **row})
    return text.getvalue().encode()


def open_study(file: Path, output: str | None) -> tuple[Plan, Path]:
    """Reads the plan, and opens the folder of its runs: a new one, or that of the same plan.

    Raises:
        UserError: no plan; the folder holds something else, or another plan.
    """
    plan = read_plan(file)
    if output is not None and (Path(output) / PLAN).exists():
        if read_plan(Path(output) / PLAN).digest != plan.digest:
            raise UserError(
                f"{file}: is not the plan that {output} was begun with ({Path(output) / PLAN}); a "
                "changed plan is another study: give a new --output"
            )
        return plan, Path(output)
    output_checks.check_free(output)
    folder = run_folder.create("study", output)
    write_atomically(folder / PLAN, file.read_bytes())
    return plan, folder


def main() -> int:
    parser = Parser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="a JSON file")
    parser.add_argument("--output", metavar="DIR", help="default: runs/study-N, a new folder")
    parser.add_argument("--results", metavar="DIR", help="tables, pictures (default: in --output)")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="runs at a time; each takes its share of the CPU's threads (default: 1)",
    )
    parser.add_argument("-j", "--workers", type=count, default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", default="auto", help="as for main.py")
    args = parser.parse_args()
    plan, folder = open_study(Path(args.plan), args.output)
    root = Path(demo_sets.prepare(plan.data) if demo_sets.is_demo(plan.data) else plan.data)
    cut = partial(
        parts.write_parts,
        root,
        train_per_class=plan.train_per_class,
        validation_per_class=plan.validation_per_class,
        seed=plan.split_seed,
    )
    demo_sets.write_once(folder / "data", cut)
    machine = ["-j", str(args.workers), "--device", args.device]

    first = choosing(plan)
    train(first, plan, folder, machine, args.jobs)
    rates = results.choose_rates(plan, collect(first, folder))
    print(columns(tables.choice_rows(plan, collect(first, folder), rates), left=2), flush=True)
    second = judged(plan, rates)
    train(second, plan, folder, machine, args.jobs)
    judge(second, root, folder, machine, args.jobs)
    runs = collect([*first, *second], folder)
    target = folder / "results" if args.results is None else Path(args.results)
    write_results(plan, folder, target, rates, runs)
    return 0


if __name__ == "__main__":
    run_script(main)

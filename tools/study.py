"""A study by plan: rates chosen on validation images, every variant tested once on test images.

python -m tools.study tools/study_plans/ablation.json --jobs 2
python -m tools.study tools/study_plans/fashion.json --output runs/fashion --jobs 2
python -m tools.study tools/study_plans/fashion.json --output runs/fashion --results results/fashion

The plan is a JSON file, written before the first run (docs/EVIDENCE.md has its fields). Runs stand
in DIR, one folder each; a command that was interrupted goes on where it stopped when it is given
again with the same --output DIR, and refuses a plan that was changed since.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm

import main as main_script
from models.attention import is_file, typed_attention
from models.registry import described_network
from tools.compare_runs import read_run
from utils.command_line.classification import FLAGS, make_parser
from utils.command_line.parser import Parser
from utils.config.classification import Recipe
from utils.config.flags import count, positive_int
from utils.data import demo_sets
from utils.inspection import study
from utils.inspection.cost import multiply_adds
from utils.inspection.study import Plan, RunResult, arch_and_flags, read_plan
from utils.runs import folder as run_folder
from utils.system.errors import EXIT_FAILED, UserError, as_user_error, require
from utils.system.faults import run_script
from utils.system.files import check_free, write_atomically
from utils.system.processes import die_with_parent, processors
from utils.system.text import columns

MAIN = (sys.executable, main_script.__file__)
# What a plan's flags may set besides a recipe's fields. The study itself gives all else, such as
# network, attention, seed, folder and device, or runs of one plan would differ in more than these.
MAY_SET = {"amp", "channels_last", "fused", "compile", "pretrained", "decoder", "class_weights"}
MAY_SET |= {field.name for field in fields(Recipe)} - {"arch", "lr"}
PLAN = "plan.json"  # the copy in a study's folder, and the mark of one
SPEED = re.compile(r"^epoch .*  ([\d,]+) images/s", re.MULTILINE)
Spec = tuple[str, str, float, int]  # network, variant, rate, seed


def run_name(spec: Spec) -> str:
    """Returns the folder's name of a run."""
    network, variant, rate, seed = spec
    names = quote(f"{network}_{variant.replace(' ', '_')}", safe="=")  # paths and colons
    return f"{names}_lr{rate}_seed{seed}"


def refuse_flags(plan: Plan) -> None:
    """Refuses flags of a plan with which a run would not be what its name says.

    main.py's own parser reads them, in whatever spelling.
    """
    parser = make_parser(main_script.RECIPE, "")
    for network, how in plan.networks.items():
        typed = parser.typed(how.flags)
        if wrong := sorted(name for name in typed if name not in MAY_SET):
            flag = "DATA" if wrong[0] == "data" else FLAGS[wrong[0]].name
            raise UserError(f"network {network}: {flag} is the study's own: leave it out of flags")


def choosing(plan: Plan) -> list[Spec]:
    """Returns the runs that choose the learning rates, where there is a choice."""
    return [
        (network, variant, rate, seed)
        for seed in plan.choosing_seeds
        for network, how in plan.networks.items()
        if len(how.rates) > 1
        for variant in plan.variants
        for rate in how.rates
    ]


def tested(plan: Plan, rates: Mapping[study.Key, float]) -> list[Spec]:
    """Returns the runs that are evaluated on the test images, seed by seed."""
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
        target = folder / "runs" / run_name(spec)
        if not is_finished(target):
            arch, flags = arch_and_flags(network, variant)
            commands[target] = [folder / "data", "-a", arch, *flags, "--lr", rate, "--seed", seed]
            commands[target] += [*plan.networks[network].flags, "--resume", "auto", *machine]
    print(f"training: {len(commands)} of {len(specs)} runs are to be done", flush=True)
    run_all(commands, jobs)


def evaluate(
    specs: Sequence[Spec], root: Path, folder: Path, machine: Sequence[str], jobs: int
) -> None:
    """Evaluates each run's best epoch on root/val, where that is not done yet."""
    commands = {}
    for spec in specs:
        name = run_name(spec)
        target = folder / "tested" / name
        if not (target / "evaluation.json").exists():
            best = folder / "runs" / name / "best.pth"
            commands[target] = [root, "-e", "--resume", best, *machine]
            if is_file(spec[1]):  # is run only where it is typed
                commands[target] += ["--attention", spec[1]]
    print(f"evaluating: {len(commands)} of {len(specs)} runs are to be done", flush=True)
    run_all(commands, jobs)


def run_all(
    commands: Mapping[Path, Sequence[object]], jobs: int, program: Sequence[str] = MAIN
) -> None:
    """Runs the program into each folder, `jobs` at a time, and says which has ended.

    What one prints goes to FOLDER.log. They end with this process, however that ends.

    Args:
        commands: folder of the run -> arguments, without --output.
    """
    environment = dict(os.environ)
    if jobs > 1:  # each has its share of the CPU
        environment.setdefault("OMP_NUM_THREADS", str(max(1, processors() // jobs)))
    waiting, running, done = deque(commands.items()), {}, 0
    on_terminal = sys.stderr.isatty()
    bar = tqdm(total=len(commands), unit="run", disable=not on_terminal)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder, arguments = waiting.popleft()
                folder.parent.mkdir(exist_ok=True)
                command = [*program, *map(str, arguments), "--output", str(folder)]
                with open(log_of(folder), "ab") as log:
                    to_log = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
                    running[folder] = subprocess.Popen(
                        command, preexec_fn=die_with_parent, **to_log
                    )
            ended = [folder for folder, process in running.items() if process.poll() is not None]
            if not ended:
                time.sleep(0.5)
            for folder in ended:
                if running.pop(folder).returncode:
                    lines = log_of(folder).read_text(errors="replace").split("\n")
                    reason = next((x for x in reversed(lines) if "error" in x), "see there")
                    raise UserError(
                        f"{folder.name} failed ({log_of(folder)}): {reason}", EXIT_FAILED
                    )
                done += 1
                bar.update()
                if not on_terminal:
                    print(f"{done}/{len(commands)} {folder.name}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()


def log_of(folder: Path) -> Path:
    """Returns the file of what a run prints."""
    return folder.with_name(f"{folder.name}.log")


def is_finished(target: Path) -> bool:
    """Returns whether a run has done all of its epochs."""
    if not (target / "metrics.csv").exists():
        return False
    run = read_run(target)
    return len(run.history) >= run.epochs


def collect(specs: Sequence[Spec], folder: Path) -> list[RunResult]:
    """Reads the results of the runs, each once."""
    return [_result(spec, folder) for spec in dict.fromkeys(specs)]


def _result(spec: Spec, folder: Path) -> RunResult:
    network, variant, rate, seed = spec
    name = run_name(spec)
    target = folder / "runs" / name
    run, saved = read_run(target), json.loads((target / "args.json").read_text())
    speeds = SPEED.findall(log_of(target).read_text(errors="replace"))
    if not speeds:
        raise UserError(
            f"{log_of(target)}: tells no speed; remove {target} to train anew", EXIT_FAILED
        )
    speed = statistics.median(float(text.replace(",", "")) for text in speeds)
    file = folder / "tested" / name / "evaluation.json"
    test = json.loads(file.read_text()) if file.exists() else {}
    environment = saved["environment"]
    if is_file(variant):
        sha256 = saved["model_kwargs"]["attention_sha256"]
        source = Path(variant.rpartition(":")[0])
        if not source.is_file():
            raise UserError(f"{variant}: no file {source} here; put it there")
        if sha256 != hashlib.sha256(source.read_bytes()).hexdigest():
            raise UserError(
                f"{variant} has changed since {target} was trained: put it back, or "
                "give a new --output"
            )
        environment = {**environment, "attention_sha256": sha256}
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
        multiply_adds=_multiply_adds(saved, variant),
        environment=environment,
    )


def _multiply_adds(saved: Mapping[str, Any], variant: str) -> int:
    """Counts those of one image, for the network that a run's args.json describes."""
    with as_user_error():
        kind = typed_attention(variant) if is_file(variant) else None
    with torch.device("meta"):
        network = described_network(saved, kind).eval()
        images = torch.empty(1, 3, saved["img_size"], saved["img_size"])
        return multiply_adds(network, images)[""]


def write_results(
    plan: Plan, folder: Path, target: Path, rates: Mapping, runs: Sequence[RunResult]
) -> None:
    """Writes the plan, the CSV of every run and of every epoch, the tables and the pictures."""
    comparisons = study.compare_all(plan, runs)
    text = study.report(plan, runs, rates, comparisons)
    choices = columns(study.choice_rows(plan, runs, rates), left=2)
    epochs = [
        {"run": run.name, **row}
        for run in runs
        for row in read_run(folder / "runs" / run.name).history
    ]
    files = {
        PLAN: (folder / PLAN).read_bytes(),
        "runs.csv": study.runs_csv(runs),
        "epochs.csv": study.csv_of(epochs),
        "choices.txt": f"{choices}\n".encode(),
        "table.txt": f"{text}\n".encode(),
        "accuracy.png": study.draw_accuracy(plan, runs, comparisons),
        "cost.png": study.draw_costs(plan, runs),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(target / name, data)
    print(text)
    print(f"written to {target}: {', '.join(files)}")


def open_study(file: Path, output: str | None, typed: Sequence[str] = ()) -> tuple[Plan, Path]:
    """Reads the plan, and opens the folder of its runs: a new one, or that of the same plan.

    Args:
        typed: the variants in users' files that may be run.
    """
    plan = read_plan(file)
    refuse_flags(plan)
    if layers := sorted({*filter(is_file, plan.variants)} ^ {*typed}):
        why = "is no such variant of it" if layers[0] in typed else "is run only where it is typed"
        raise UserError(f"{file}: --attention {layers[0]} {why}")
    if output is not None and (Path(output) / PLAN).exists():
        if read_plan(Path(output) / PLAN).digest != plan.digest:
            raise UserError(
                f"{file}: is not the plan that {output} was begun with ({Path(output) / PLAN}); a "
                "changed plan is another study: give a new --output"
            )
        return plan, Path(output)
    check_free(output)
    folder = run_folder.create("study", output)
    write_atomically(folder / PLAN, file.read_bytes())
    return plan, folder


def main() -> int:
    parser = Parser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="a JSON file")
    parser.add_argument("--output", metavar="DIR", help="default: runs/study-N, a new folder")
    parser.add_argument("--results", metavar="DIR", help="tables, pictures (default: in --output)")
    jobs = "runs at a time; each takes its share of the CPU's threads (default: 1)"
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help=jobs)
    own = "a variant of the plan in a user's file, which is run only where it is typed"
    parser.add_argument(
        "--attention", action="append", default=[], metavar="FILE.py:CLASS", help=own
    )
    parser.add_argument("-j", "--workers", type=count, default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", default="auto", help="as for main.py")
    args = parser.parse_args()
    require(("scipy",), "python -m tools.study", "scipy")
    plan, folder = open_study(Path(args.plan), args.output, args.attention)
    root = Path(demo_sets.prepare(plan.data))
    cut = partial(
        study.write_parts,
        root,
        train_per_class=plan.train_per_class,
        validation_per_class=plan.validation_per_class,
        seed=plan.split_seed,
    )
    demo_sets.write_once(folder / "data", cut)
    machine = ["-j", str(args.workers), "--device", args.device]

    first = choosing(plan)
    train(first, plan, folder, machine, args.jobs)
    tried = collect(first, folder)
    rates = study.choose_rates(plan, tried)
    print(columns(study.choice_rows(plan, tried, rates), left=2), flush=True)
    second = tested(plan, rates)
    train(second, plan, folder, machine, args.jobs)
    evaluate(second, root, folder, machine, args.jobs)
    runs = collect([*first, *second], folder)
    target = folder / "results" if args.results is None else Path(args.results)
    write_results(plan, folder, target, rates, runs)
    return 0


if __name__ == "__main__":
    run_script(main)

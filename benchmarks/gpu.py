"""All that needs a GPU, in ten minutes: is it right, does it resume bit for bit, how fast is it?

    python benchmarks/gpu.py [--batch N] [--json FILE]
    python benchmarks/gpu.py --device cpu --smoke

Each step is a process of its own, started as a user would start it: the tests that need a GPU (the
kernels beside double precision among them), runs that are killed and resumed, training on all GPUs
through DataParallel and DistributedDataParallel, the benchmarks, and the exported files on the CPU.
The rows of all are written to results/gpu-NAME.json; those for docs/PERFORMANCE.md are printed, and
what failed. The exit code is 1 where something did. --smoke runs every step tiny.
"""

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script

MINUTES, LONGEST = 10, 240  # of all; seconds of one step
SMOKE = "wanted_gradients or stride or fault and gate"  # of the tests, through the interpreter
INTERPRETER = (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""))


class Step(NamedTuple):
    """One process."""

    name: str
    command: tuple[object, ...]  # after Python's name
    says: str = ""  # a pattern that must be in its output: what is reported
    environment: tuple[tuple[str, str], ...] = ()


def steps(args: Namespace, gpus: int) -> Iterator[Step]:
    """Yields what is run, the most important first."""
    smoke, device, tests = args.smoke, ("--device", args.device.type), side.ROOT / "tests"
    pytest = ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider")
    pytest += ("--rootdir", side.ROOT, "-c", side.ROOT / "pyproject.toml")
    few = (tests / "models" / "fused" / "test_triton_tail.py", "-k", SMOKE) if smoke else (tests,)
    yield Step("tests", (*pytest, *few), r"\d+ passed.*", INTERPRETER if smoke else ())

    size = () if smoke else ("--img-size", 224, "--amp", "bf16", "--channels-last")
    flags = ("-a", "eca_resnet18", "-b", 128, "--epochs", 2 - smoke, "--seed", 1, *size, *device)
    driver = (tests / "helpers" / "kill_driver.py", "main.py", "demo:digits", "kills", 2 - smoke)
    often = ("--save-every", 2, "-p", 1, *(("--gpu", 0) if gpus else ()))
    yield Step("kill and resume", (*driver, *flags, *often), r"trial .*, equal")
    ranks = gpus or 2
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    train = (side.ROOT / "main.py", "demo:digits", *flags, "--output")
    name = f"DistributedDataParallel, {ranks} ranks"
    yield Step(name, (*launcher, *train, "ddp"), r"done: .*")
    if gpus > 1:
        yield Step(f"DataParallel, {gpus} GPUs", (*train, "dp"), r"done: .*")

    tiny = ("--smoke",) if smoke else ()
    sized = ("--batch", args.batch, "--rounds", args.rounds, "--img-size", args.img_size, *device)
    for name, *flags in (
        ("train_step", *sized),
        ("tail", *sized),
        ("memory", *device),
        ("inference", "--no-compile", *sized),
        ("tail", "--rounds", 3, *device, "--table"),
        ("deployment", "--network", "mobilenetv2", "--no-compile", "--rounds", 5),
    ):
        title = f"{name} --table" if "--table" in flags else name
        script = side.ROOT / "benchmarks" / f"{name}.py"
        yield Step(title, (script, *flags, *tiny, "--json", f"{title}.json"))


def run(step: Step, limit: float, folder: Path) -> dict[str, object]:
    """Runs a step in `folder`; returns what it said, and why it failed, which is None if not.

    Args:
        limit: seconds; 0 or less where none are left.
    """
    command = [*map(str, step.command)]
    began, failed, out, err = time.monotonic(), None, "", ""
    if limit <= 0:
        failed = f"not run: the {MINUTES} minutes were over"
    else:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        pipes |= {"cwd": folder, "env": os.environ | dict(step.environment)}
        process = subprocess.Popen([sys.executable, *command], start_new_session=True, **pipes)
        try:
            out, err = process.communicate(timeout=limit)
            if process.returncode:
                lines = (err.strip() or out.strip() or "it said nothing").splitlines()
                failed = f"exit code {process.returncode}: {lines[-1]}"
            elif not re.search(step.says, out):
                failed = f"exit code 0, but its output has nothing like {step.says!r}"
        except subprocess.TimeoutExpired:
            failed = f"took more than {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
                process.wait()
    said = re.findall(f"device: .*|{step.says or 'device: .*'}", out)
    return {
        "step": step.name,
        "command": " ".join(["python", *command]).replace(f"{side.ROOT}{os.sep}", ""),
        "seconds": round(time.monotonic() - began, 1),
        "said": list(dict.fromkeys(said)),
        "failed": failed,
        "log": None if failed is None else out[-3000:] + err[-3000:],
    }


# Of the rows: benchmark, the variant's and the other's beginnings, the goal, and the words for it.
ROWS = (
    ("train_step", "ours, ECA, {}", "torchvision's plain, {}", 0.98, "training step, speed over"),
    ("inference", "our eca, optimised {}", "our plain, optimised {}", 0.95, "inference over"),
    ("tail", "ours, ECA", "plain, eager", 0.98, "ends of ResNet-50's blocks over"),
    ("memory", "our ECA-ResNet-50", "torchvision's ResNet-50", 1.005, "memory of a step over"),
)


def performance_rows(rows: list[dict], name: str) -> list[str]:
    """Returns the rows of docs/PERFORMANCE.md's table: what, goal, measured, met or missed."""
    shown = []

    def show(what: str, ratio: float, goal: float, more: str = "") -> None:
        less = goal > 1  # memory; the others are speeds
        met = "met" if (ratio <= goal if less else ratio >= goal) else "missed"
        shown.append(f"| {what} | {'≤' if less else '≥'} {goal} | {ratio:.3f}{more} | {met} |")

    for benchmark, variant, baseline, goal, words in ROWS:
        for row in rows:
            pair = (variant.format(row["dtype"]), baseline.format(row["dtype"]))
            if (row["benchmark"], row["variant"], row["baseline"]) != (benchmark, *pair):
                continue
            if isinstance(row.get("shape"), list):
                continue  # one of those that the row of ResNet-50's blocks sums up
            about = [name, row["dtype"], row.get("network"), row.get("layout"), row.get("what")]
            label = ", ".join([*filter(None, about), f"batch {row['batch']}"])
            speed = row.get("images_per_second")
            more = f", {speed:,.0f} images/s" if speed else ""
            what = f"{label}: {words} {baseline.partition(',')[0]}"
            show(what, row["ratio_median"], goal, more)
    if table := [row["ratio_median"] for row in rows if row["benchmark"] == "tail --table"]:
        what = f"{name}: the slowest of {len(table)} ends of blocks over its modules"
        show(what, min(table), 0.98)
    return shown


def main() -> int:
    parser = side.make_parser(__doc__, batch=(16, 256), rounds=7)
    args = side.settle(parser.parse_args())
    if args.device.type == "cpu" and not args.smoke:
        raise UserError("no CUDA device; --device cpu --smoke runs every step tiny on the CPU")
    name = side.device_name(args.device)
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 0
    if args.json is None and not args.smoke:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        args.json = side.ROOT / "results" / f"gpu-{slug}.json"
    report = side.settings(args) | {"gpus": gpus, "steps": [], "rows": []}
    patience = 10 if args.smoke else 1  # a busy CPU's
    end = time.monotonic() + 60 * MINUTES * patience
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(args, gpus):
            print(f"{step.name} …", flush=True)
            limit = min(LONGEST * patience, end - time.monotonic())
            done = run(step, limit, Path(folder))
            report["steps"].append(done)
            for line in (*done["said"], done["failed"] and f"failed: {done['failed']}"):
                if line:
                    print(f"  {line}", flush=True)
        for file in sorted(Path(folder).glob("*.json")):
            report["rows"] += json.loads(file.read_text() or "[]")  # of one that failed
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(f"{len(report['rows'])} rows in {args.json}")
    print("for docs/PERFORMANCE.md:", *performance_rows(report["rows"], name), sep="\n")
    failed = [step["step"] for step in report["steps"] if step["failed"]]
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return EXIT_FAILED if failed else 0


if __name__ == "__main__":
    run_script(main)

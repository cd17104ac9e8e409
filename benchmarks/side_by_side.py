"""Timing side by side: what the benchmarks share.

The variants run in one process, in a new random order in each round, so that whatever disturbs the
machine disturbs them alike. A ratio is a baseline's time over a variant's in the same round: above
1 the variant is faster.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts' own packages

import torch  # noqa: E402
import torchvision  # noqa: E402

try:
    import timm
except ImportError:
    timm = None

from utils.command_line.parser import Parser  # noqa: E402
from utils.config.flags import positive_int  # noqa: E402
from utils.system import distributed  # noqa: E402
from utils.system.backends import configure, keep_freed_memory  # noqa: E402
from utils.system.errors import EXIT_FAILED, UserError  # noqa: E402
from utils.system.text import columns  # noqa: E402

Times = dict[str, list[float]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_parser(description: str, *, batch: tuple[int, int], rounds: int) -> Parser:
    """The flags that all have; `batch` is the default on CPU and on CUDA."""
    parser = Parser(description=description)
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--batch", type=positive_int, help=f"{batch[0]} on CPU, {batch[1]} on CUDA")
    parser.add_argument("--rounds", type=positive_int, default=rounds)
    parser.add_argument("--img-size", type=positive_int, default=224)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there")
    parser.add_argument("--smoke", action="store_true", help="tiny and short: does it run?")
    parser.set_defaults(batch_of_device=batch)
    return parser


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on the device, and sets torch as a training run would."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not cpu or cuda")
    args.device = distributed.setup(name).device
    if args.json:  # not after minutes of measuring
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
        except OSError as error:
            raise UserError(
                f"--json {args.json}: {error.strerror}; give another file", EXIT_FAILED
            ) from None
    if args.smoke:
        args.rounds, args.img_size, args.batch = 1, 32, 2
    args.batch = args.batch or args.batch_of_device[args.device.type == "cuda"]
    configure(False, args.device)  # as a training run, for every variant
    return args


def bfloat16_is_native(device: torch.device) -> bool:
    """Elsewhere it is emulated, many times slower, and there is nothing to compare."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtypes_for(device: torch.device) -> list[str]:
    return ["float32", "bfloat16"] if bfloat16_is_native(device) else ["float32"]


def compiled_dtypes(args: argparse.Namespace) -> list[str]:
    """Those worth a minute of compiling: on CUDA the quickest alone."""
    dtypes = dtypes_for(args.device)
    return dtypes[-1:] if args.device.type == "cuda" else dtypes


def interleave(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    repeat: int = 1,
    pause: float = 0,
) -> Times:
    """Seconds a call of each variant, one figure a round, after warm-up.

    Args:
        repeat: calls that are timed together.
        pause: seconds of rest before each.
    """

    def timed(function: Callable[[], object]) -> float:
        time.sleep(pause)
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeat):
            function()
        _wait(device)
        return (time.perf_counter() - began) / repeat

    for function in variants.values():
        for _ in range(3 if device.type == "cuda" else 1):
            timed(function)
    times: Times = {name: [] for name in variants}
    for _ in range(rounds):
        for name in random.sample(list(variants), len(variants)):
            times[name].append(timed(variants[name]))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def settings(args: argparse.Namespace) -> dict[str, object]:
    """What every row carries about where it was measured."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "device": device_name(args.device),
        "batch": args.batch,
        "img_size": args.img_size,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__ if timm else None,
        "python": platform.python_version(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit,
    }


def compare(
    benchmark: str,
    times: Times,
    pairs: list[tuple[str, str]],
    dtypes: dict[str, str],
    common: dict[str, object],
) -> list[dict[str, object]]:
    """A row for each (variant, baseline)."""
    rows = []
    for variant, baseline in pairs:
        ratios = [b / v for b, v in zip(times[baseline], times[variant], strict=True)]
        rows.append(
            {
                "benchmark": benchmark,
                "variant": variant,
                "baseline": baseline,
                "dtype": dtypes[variant],
                "ratio_min": min(ratios),
                "ratio_median": statistics.median(ratios),
                "ratio_max": max(ratios),
                "seconds_median": statistics.median(times[variant]),
                **common,
            }
        )
    return rows


def report(
    args: argparse.Namespace, rows: list[dict[str, object]], unit: str, shown: str = "{variant}"
) -> None:
    """Prints the rows as a table under the settings, and writes them where --json says.

    Args:
        unit: what the ratio is.
        shown: text of the first column, with a row's fields in braces.
    """
    common = rows[0]
    print(
        f"{common['device']}; torch {common['torch']}, torchvision {common['torchvision']},"
        f" timm {common['timm'] or 'not installed'}; batch {common['batch']},"
        f" {common['img_size']}×{common['img_size']}, {common['rounds']} rounds"
        f"{', smoke run: the figures mean nothing' if args.smoke else ''}"
    )
    print(f"ratio = {unit}")
    table = [["variant", "against", "min", "median", "max"]]
    for row in rows:
        ratios = [f"{row[key]:.3f}" for key in ("ratio_min", "ratio_median", "ratio_max")]
        table.append([shown.format_map(row), row["baseline"], *ratios])
    print(columns(table, left=2))
    write_rows(args, rows)


def write_rows(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Writes the rows where --json says."""
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        print(f"{len(rows)} rows in {args.json}")


def keeps_memory(device: torch.device) -> bool:
    """Whether this process, on a CPU with glibc, keeps freed memory, as the scripts do."""
    return device.type == "cpu" and keep_freed_memory()  # once more: it says whether it can


class AsItIs:
    """Calls `build(*args)()` in a process whose allocator is left as glibc has it, and waits.

    What the textbook form takes for those who run it as it is commonly run needs such a process.

    Args:
        build: a function of a module, as it is found there by name.
    """

    def __init__(self, build: Callable[..., Callable[[], object]], *args: object):
        context = multiprocessing.get_context("spawn")  # a fork would inherit the allocator
        self.pipe, others = context.Pipe()
        work = (others, build, args, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=work, daemon=True)
        self.process.start()
        others.close()  # so that its end is seen here
        self.pipe.recv()

    def __call__(self) -> None:
        self.pipe.send(None)
        self.pipe.recv()


def _serve(pipe: Connection, build: Callable, args: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    function = build(*args)
    while True:
        pipe.send(None)
        try:
            pipe.recv()
        except EOFError:  # the benchmark is over
            return
        function()

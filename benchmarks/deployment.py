"""The same network by every engine that can run it on a CPU: speed, start-up, memory.

    python benchmarks/deployment.py [--network resnet50|mobilenetv2|both] [--checkpoint CKPT]
                                    [--images DIR] [--no-compile] [--batch N] [--out FILE] [--smoke]

The textbook form in PyTorch, ours as --fast makes it, the same compiled, and the files of export.py
by onnxruntime and OpenVINO, each in float32 and int8. All in one process, one after the other in a
new random order in each round, with a pause before each, for threads that spin after their work.
Start-up (from the start of a process to the first logits, imports included) and peak memory are of
a process of its own for each engine. The plain network by OpenVINO stands beside the one with ECA.
"""

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import one_engine
import textbook
import torch

import models
from models.inference import optimise_for_inference
from models.weights import Network, describe_network
from utils.data.transforms import Preprocessing
from utils.inspection import export, int8
from utils.inspection.predictions import find_images, read_batches
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script
from utils.system.text import columns

NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime")}
NEEDS["openvino"] = (*NEEDS["onnxruntime"], "openvino")  # its int8 is onnxruntime's
CALIBRATION = 64
PLAIN = "plain network, OpenVINO float32"
BASES = {"textbook": "textbook, eager", "eager": "ours, module by module"}  # by engine
PAUSE = 0.02  # seconds
OFF = 1e-3  # of the largest logit: float32 that is further off computes something else


@dataclass(frozen=True)
class Variant:
    """One engine with its file."""

    engine: str
    file: Path
    dtype: str = "float32"


def calibration_images(args: Namespace, size: int, crop: float) -> list[torch.Tensor]:
    """Batches of one size, and a line on what they are."""
    batch, count = (2, 4) if args.smoke else (16, CALIBRATION)
    if not args.images:
        print(f"int8: calibrated on {count} random images", flush=True)
        return [torch.randn(batch, 3, size, size) for _ in range(count // batch)]
    paths = find_images([args.images])[:count]
    batch = min(batch, len(paths))
    paths = paths[: len(paths) // batch * batch]
    batches = []
    for read in read_batches(paths, Preprocessing(size, crop), batch, torch.device("cpu"), 0):
        if read.broken:
            index, reason = read.broken[0]
            raise UserError(f"{paths[index].decode(errors='replace')}: {reason}", EXIT_FAILED)
        batches.append(read.images)
    print(f"int8: calibrated on {len(paths)} images of {args.images}", flush=True)
    return batches


def exported(network: Network, size: int) -> bytes:
    """An ONNX file as export.py writes it."""
    network = copy.deepcopy(network).requires_grad_(False)
    form = optimise_for_inference(network, torch.float32).network
    side_length = max(size, 64)
    graph = export.to_exported(form, (side_length, side_length + 32))
    return export.to_onnx(graph, {"arch": network.arch, "precision": "float32"})


def write(folder: Path, name: str, onnx_file: bytes, openvino: bool) -> None:
    (folder / f"{name}.onnx").write_bytes(onnx_file)
    if openvino:
        xml, weights = export.to_openvino(onnx_file, {})
        (folder / f"{name}.xml").write_bytes(xml)
        (folder / f"{name}.bin").write_bytes(weights)


def prepare(
    network: Network, size: int, crop: float, args: Namespace, folder: Path
) -> dict[str, Variant]:
    """Writes the files of each engine, and says which engines are left out."""
    ours = folder / "ours.pth"
    torch.save({"format": 1, **describe_network(network), "state_dict": network.state_dict()}, ours)
    base = base_engine(network)
    made = {BASES[base]: Variant(base, ours)}
    made["ours, --fast"] = Variant("fast", ours)
    if not (args.no_compile or args.smoke):
        made["ours, compiled"] = Variant("compiled", ours)
    lacking = {e: [p for p in packages if find_spec(p) is None] for e, packages in NEEDS.items()}
    for engine, packages in lacking.items():
        if packages:
            how = "pip install -r requirements-export.txt"
            print(f"{engine} is left out: {', '.join(packages)} not installed ({how})", flush=True)
    there = [engine for engine in NEEDS if not lacking[engine]]
    if not there:
        return made
    float_file = exported(network, size)
    write(folder, "float32", float_file, "openvino" in there)
    int8_file = int8.quantise(float_file, calibration_images(args, size, crop))
    write(folder, "int8", int8_file, "openvino" in there)
    engines = (("onnxruntime", "onnxruntime", "onnx"), ("openvino", "OpenVINO", "xml"))
    for engine, shown, ending in engines:
        for dtype in ("float32", "int8") if engine in there else ():
            made[f"{shown} {dtype}"] = Variant(engine, folder / f"{dtype}.{ending}", dtype)
    plain = network.arch.removeprefix("eca_")
    if "openvino" in there and plain != network.arch and plain in models.MODELS:
        other = models.create_model(plain, num_classes=network.num_classes).eval()
        write(folder, "plain", exported(other, size), openvino=True)
        made[PLAIN] = Variant("openvino", folder / "plain.xml")
    return made


def base_engine(network: Network) -> str:
    """The textbook form, where the network has one: the released kernel sizes, and ECA."""
    build = textbook.OF_OURS.get(network.arch)
    if build is None or network.attention != "eca":
        return "eager"
    with torch.device("meta"):
        theirs = build(num_classes=network.num_classes)
    shapes = [[tuple(v.shape) for v in n.state_dict().values()] for n in (theirs, network)]
    return "textbook" if shapes[0] == shapes[1] else "eager"


def networks(args: Namespace) -> Iterator[tuple[Network, int, float]]:
    """Each network with its image size and crop."""
    if args.checkpoint:
        saved = Checkpoint.read(Path(args.checkpoint))
        saved.refuse_detector()
        network = saved.network()
        look = saved.preprocessing()
        yield network.eval(), args.img_size if args.smoke else look.img_size, look.crop_pct
        return
    for name in ("resnet50", "mobilenetv2"):
        if args.network in (name, "both"):
            arch = "eca_resnet18" if args.smoke else f"eca_{name}"
            yield models.create_model(arch).eval(), args.img_size, 0.875
            if args.smoke:
                return


def alone(variant: Variant, size: int, batches: list[int]) -> dict:
    """Start-up and peak memory in a process of its own."""
    command = [sys.executable, one_engine.__file__, variant.engine, str(variant.file)]
    command += ["--batches", *map(str, batches), "--img-size", str(size)]
    command += ["--threads", str(torch.get_num_threads()), "--began", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{variant.engine}, {variant.file.name}: {reason}", EXIT_FAILED)
    return json.loads(done.stdout.splitlines()[-1])


def pairs_of(variants: Mapping[str, Variant], base: str) -> list[tuple[str, str]]:
    """What is compared with what: all with the first, int8 with float32, ECA with plain."""
    pairs = [(name, base) for name in variants if name not in (base, PLAIN)]
    for engine in ("onnxruntime", "OpenVINO"):
        if f"{engine} int8" in variants:
            pairs.append((f"{engine} int8", f"{engine} float32"))
    if PLAIN in variants:
        pairs.append(("OpenVINO float32", PLAIN))
    return pairs


def measure(network: Network, size: int, crop: float, args: Namespace, batches: list[int]):
    """The rows of one network, and tables of them."""
    rows, base = [], BASES[base_engine(network)]
    with tempfile.TemporaryDirectory() as folder:
        variants = prepare(network, size, crop, args, Path(folder))
        own = {name: alone(v, size, batches) for name, v in variants.items()}
        threads = torch.get_num_threads()
        runs = {n: one_engine.ENGINES[v.engine](str(v.file), threads) for n, v in variants.items()}
        for batch in batches:
            images = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
            expected = runs[base](images)
            largest = float(np.abs(expected).max())
            apart = {name: np.abs(run(images) - expected).max() for name, run in runs.items()}
            off = {name: float(difference) / largest for name, difference in apart.items()}
            for name, v in variants.items():
                if v.dtype == "float32" and name != PLAIN and off[name] > OFF:
                    raise UserError(f"{name}: logits off by {off[name]:.1e} of {base}", EXIT_FAILED)
            calls = {name: partial(run, images) for name, run in runs.items()}
            repeat = 1 if batch > 1 or args.smoke else 3
            times = side.interleave(calls, args.rounds, args.device, repeat, PAUSE)
            common = side.settings(Namespace(**{**vars(args), "batch": batch, "img_size": size}))
            common |= {"network": network.arch, "calibration": args.images or "random"}
            dtypes = {name: v.dtype for name, v in variants.items()}
            compared = side.compare("deployment", times, pairs_of(variants, base), dtypes, common)
            for row in compared:
                for prefix, engine in (
                    ("", own[row["variant"]]),
                    ("baseline_", own[row["baseline"]]),
                ):
                    row[f"{prefix}startup_seconds"] = engine["startup_seconds"]
                    row[f"{prefix}peak_mebibytes"] = engine["peak_mebibytes"][str(batch)]
                row["logits_off"] = off[row["variant"]]
                row["baseline_seconds_median"] = statistics.median(times[row["baseline"]])
            rows += compared
            show(compared, base)
    return rows


def show(rows: list[dict], base: str) -> None:
    """Prints the rows of one network and batch: against the first, then the other pairs."""
    first = next(row for row in rows if row["baseline"] == base)
    setting = f"{first['network']}, {first['img_size']} pixels, batch {first['batch']}"
    print(f"\n{setting}: speed over {base}")
    head = ["engine", "min", "median", "max", "start-up s", "peak MiB", "logits off"]
    table = [head, [base, *["1.000"] * 3, *_own(first, "baseline_"), "-"]]
    others = []
    for row in rows:
        ratios = [f"{row[key]:.3f}" for key in ("ratio_min", "ratio_median", "ratio_max")]
        if row["baseline"] == base:
            table.append([row["variant"], *ratios, *_own(row), f"{row['logits_off']:.0e}"])
        elif row["baseline"] == PLAIN:
            others.append(["ECA over plain in OpenVINO's float32", *ratios])
        else:
            others.append([f"{row['variant']} over {row['baseline']}", *ratios])
    print(columns(table, left=1))
    if others:
        print(columns([["in the same engine", *head[1:4]], *others], left=1), flush=True)


def _own(row: dict, prefix: str = "") -> list[str]:
    return [f"{row[f'{prefix}startup_seconds']:.2f}", f"{row[f'{prefix}peak_mebibytes']:,.0f}"]


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 16), rounds=15)
    parser.add_argument("--network", choices=("resnet50", "mobilenetv2", "both"), default="both")
    parser.add_argument("--checkpoint", metavar="CKPT", help="a classifier of your own instead")
    parser.add_argument("--images", metavar="DIR", help="int8 is calibrated on these, not on noise")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", dest="json", metavar="FILE", type=Path, help="the same as --json")
    args = parser.parse_args()
    if args.device not in (None, "cpu"):
        raise UserError(
            f"--device {args.device}: the engines are compared on the CPU; leave it out"
        )
    args.device = "cpu"
    batches = [1, 2] if args.smoke else [args.batch] if args.batch else [1, 16]
    args = side.settle(args)
    rows = []
    for network, size, crop in networks(args):
        rows += measure(network, size, crop, args, batches)
    first = rows[0]
    print(
        f"\n{first['device']}; torch {first['torch']}, {first['rounds']} rounds"
        f"{', smoke run: the figures mean nothing' if args.smoke else ''}"
    )
    side.write_rows(args, rows)


if __name__ == "__main__":
    run_script(main)

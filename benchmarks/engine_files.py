"""Writes the files that deployment.py compares: a checkpoint of ours, and export.py's files.

A package that is missing is said, and its engine left out.
"""

import copy
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import textbook
import torch

import models
from models.inference import optimise_for_inference
from models.weights import Network, describe_network
from utils.inspection import export, int8
from utils.inspection.predictions import find_images, read_batches
from utils.system.errors import EXIT_FAILED, UserError

NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime")}
NEEDS["openvino"] = (*NEEDS["onnxruntime"], "openvino")  # its int8 is onnxruntime's
CALIBRATION = 64
PLAIN = "plain network, OpenVINO float32"


@dataclass(frozen=True)
class Variant:
    """One engine with its file."""

    engine: str
    file: Path
    dtype: str = "float32"


def missing(engine: str) -> list[str]:
    return [package for package in NEEDS[engine] if find_spec(package) is None]


def calibration_images(args: Namespace, size: int, crop: float) -> list[torch.Tensor]:
    """Batches of one size, and a line on what they are.

    Raises:
        UserError: an image cannot be read.
    """
    batch, count = (2, 4) if args.smoke else (16, CALIBRATION)
    if not args.images:
        print(f"int8: calibrated on {count} random images", flush=True)
        return [torch.randn(batch, 3, size, size) for _ in range(count // batch)]
    paths = find_images([args.images])[:count]
    batch = min(batch, len(paths))
    paths = paths[: len(paths) // batch * batch]
    found = []
    for read in read_batches(paths, size, crop, batch, torch.device("cpu"), 0):
        if read.broken:
            index, reason = read.broken[0]
            raise UserError(f"{paths[index].decode(errors='replace')}: {reason}", EXIT_FAILED)
        found.append(read.images)
    print(f"int8: calibrated on {len(paths)} images of {args.images}", flush=True)
    return found


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
    made = {base_name(network): Variant(base_engine(network), ours)}
    made["ours, --fast"] = Variant("fast", ours)
    if not (args.no_compile or args.smoke):
        made["ours, compiled"] = Variant("compiled", ours)
    there = [
        engine for engine in NEEDS if not (lacking := missing(engine)) or _say(engine, lacking)
    ]
    if not there:
        return made
    float_file = exported(network, size)
    write(folder, "float32", float_file, "openvino" in there)
    int8_file = int8.quantise(float_file, calibration_images(args, size, crop))
    write(folder, "int8", int8_file, "openvino" in there)
    for engine, shown, ending in (
        ("onnxruntime", "onnxruntime", "onnx"),
        ("openvino", "OpenVINO", "xml"),
    ):
        for dtype in ("float32", "int8") if engine in there else ():
            made[f"{shown} {dtype}"] = Variant(engine, folder / f"{dtype}.{ending}", dtype)
    plain = network.arch.removeprefix("eca_")
    if "openvino" in there and plain != network.arch and plain in models.MODELS:
        other = models.create_model(plain, num_classes=network.num_classes).eval()
        write(folder, "plain", exported(other, size), openvino=True)
        made[PLAIN] = Variant("openvino", folder / "plain.xml")
    return made


def _say(engine: str, lacking: list[str]) -> bool:
    print(
        f"{engine} is left out: {', '.join(lacking)} not installed "
        "(pip install -r requirements-export.txt)",
        flush=True,
    )
    return False


def base_engine(network: Network) -> str:
    """The textbook form, where the network has one: the released kernel sizes, and ECA."""
    made = textbook.OF_OURS.get(network.arch)
    if made is None or network.attention != "eca":
        return "eager"
    with torch.device("meta"):
        theirs = made(num_classes=network.num_classes)
    shapes = [[tuple(v.shape) for v in n.state_dict().values()] for n in (theirs, network)]
    return "textbook" if shapes[0] == shapes[1] else "eager"


def base_name(network: Network) -> str:
    return "textbook, eager" if base_engine(network) == "textbook" else "ours, module by module"

"""Writes a network for other programs: ONNX, torch.export's .pt2, OpenVINO's .xml and .bin.

Each function returns the file's bytes. The optional packages are imported where they are used.
"""

import functools
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.optional_packages import require

NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "safetensors": ("safetensors",),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "hf": ("safetensors",),
}
INPUT, OUTPUT = "images", "logits"
METADATA = "metadata.json"  # within a .pt2
OPENVINO_INFO = ["eca_net", "metadata"]  # where an .xml keeps them
TEXT_METADATA = (
    "arch",
    "attention",
    "backbone",
    "decoder",
    "precision",
)  # those that stand in ONNX as they are
MEAN_AND_STD = (IMAGENET_MEAN, IMAGENET_STD)  # what the images of all networks here are made with
TOLERANCE = 1e-4  # relative to the largest logit


def check_packages(formats: Sequence[str], int8: bool = False) -> None:
    """Refuses an export, before its work, when a package is missing.

    Raises:
        UserError: names the packages and how to get them.
    """
    for name in formats:
        require(NEEDS[name], f"--to {name}", "-r requirements-export.txt")
    if int8:
        require(NEEDS["onnx"], "--int8", "-r requirements-export.txt")


def to_exported(
    network: nn.Module, size: tuple[int, int], any_size: bool = True
) -> torch.export.ExportedProgram:
    """Returns the graph of `network` for any batch and, if so asked, any height and width.

    Args:
        network: (N, 3, H, W) float32 → logits (N, C), in eval mode on the CPU.
        size: height and width of the example that it is traced with. Equal sides, or ones that
            leave a single position of the last feature map, would be taken for a rule.
    """
    axes = (0, 2, 3) if any_size else (0,)
    dynamic = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return torch.export.export(network, (torch.zeros(2, 3, *size),), dynamic_shapes=(dynamic,))


def to_pt2(exported: torch.export.ExportedProgram, metadata: Mapping[str, object]) -> bytes:
    """Returns a .pt2 file: `torch.export.load` gives the program, and metadata.json as an extra
    file.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tensors that share memory, which is as it should be
        torch.export.save(exported, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def to_onnx(exported: torch.export.ExportedProgram, metadata: Mapping[str, object]) -> bytes:
    """Returns an ONNX file, input "images" and output "logits"; the metadata are its properties."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the exporter's own future
        program = torch.onnx.export(
            exported, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )
    model = program.model_proto
    for dimension, name in ((0, "batch"), (2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[dimension].dim_param = name
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    return model.SerializeToString()


def run_onnx(data: bytes) -> Callable[[Tensor], Tensor]:
    """Runs the network in an ONNX file by onnxruntime, on the CPU."""
    import onnxruntime

    return by_onnxruntime(onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]))


def by_onnxruntime(session) -> Callable[[Tensor], Tensor]:
    """Returns a function images → logits through an onnxruntime.InferenceSession."""
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@functools.cache
def openvino_core() -> Any:
    """Returns the process's one openvino.Core, which lives to the end of the process.

    Each Core gives the thread a stack for signals and, when it goes, puts back the one of before.
    Two that go in the order in which they came leave the stack of the first, which is freed by
    then: the next signal, of a child that ends, say, is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def to_openvino(onnx_file: bytes, metadata: Mapping[str, object]) -> tuple[bytes, bytes]:
    """Returns OpenVINO's two files, .xml and .bin, of the network in an ONNX file."""
    import openvino

    model = openvino_core().read_model(onnx_file)
    model.set_rt_info(json.dumps(metadata), OPENVINO_INFO)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.xml"
        openvino.save_model(model, target, compress_to_fp16=False)
        return target.read_bytes(), target.with_suffix(".bin").read_bytes()


def run_openvino(xml: bytes, weights: bytes) -> Callable[[Tensor], Tensor]:
    """Runs the network in OpenVINO's files (.xml, .bin), on the CPU in the files' precision."""
    return by_openvino(openvino_core().read_model(xml, weights))


def by_openvino(model) -> Callable[[Tensor], Tensor]:
    """Returns a function images → logits through an openvino.Model, on the CPU.

    Without the hint OpenVINO would compute in bfloat16 where the processor has it, and other
    machines would give other figures.
    """
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino_core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()])[0].copy())


def run_pt2(data: bytes) -> Callable[[Tensor], Tensor]:
    """Runs the network in a .pt2 file."""
    return torch.export.load(io.BytesIO(data)).module()


@torch.no_grad()
def largest_difference(
    written: Callable[[Tensor], Tensor],
    network: nn.Module,
    shapes: Sequence[tuple[int, int, int]],
    name: str,
) -> float:
    """Runs a network and its file on random images, and compares their logits.

    Args:
        shapes: batch size, height and width of each trial.
        name: of the file, for messages.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        UserError: it is more than `TOLERANCE`, or the file cannot be run.
    """
    chance = torch.Generator().manual_seed(0)
    worst = 0.0
    for n, height, width in shapes:
        images = torch.randn(n, 3, height, width, generator=chance)
        expected = network(images)
        try:
            found = written(images)
        except Exception as error:  # what a runtime raises is open-ended
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"{name} does not run at {tuple(images.shape)}: {reason}; not written", EXIT_FAILED
            ) from None
        difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        worst = max(worst, float(difference.nan_to_num(float("inf"))))
    if worst > TOLERANCE:
        raise UserError(
            f"{name} differs from the network by {worst:.1e} of the largest logit, more than "
            f"{TOLERANCE:g}: not written",
            EXIT_FAILED,
        )
    return worst

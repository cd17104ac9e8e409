"""A network as a file for other programs: ONNX, torch.export's .pt2, safetensors.

Each function returns the file's bytes. The optional packages are imported where they are used.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.system.errors import EXIT_FAILED, UserError

NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "safetensors": ("safetensors",),
}
INPUT, OUTPUT = "images", "logits"
METADATA = "metadata.json"  # within a .pt2
VERSION = "checkpoint_format"  # in the header of .safetensors, where "format" is "pt" by custom
TOLERANCE = 1e-4  # relative to the largest logit


def check_packages(formats: Sequence[str]) -> None:
    """Ends the export before its work when a package is missing.

    Raises:
        UserError: names the packages and how to get them.
    """
    for name in formats:
        missing = [p for p in NEEDS[name] if importlib.util.find_spec(p) is None]
        if missing:
            raise UserError(
                f"--to {name} needs {', '.join(missing)}: pip install -r requirements-export.txt"
            )


def to_exported(
    network: nn.Module, size: tuple[int, int], any_size: bool = True
) -> torch.export.ExportedProgram:
    """The graph of `network` for any batch and, if so wanted, any height and width.

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
    """A .pt2 file: `torch.export.load` gives the program, and metadata.json as an extra file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tensors that share memory, which is as it should be
        torch.export.save(exported, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def to_onnx(exported: torch.export.ExportedProgram, metadata: Mapping[str, object]) -> bytes:
    """An ONNX file, input "images" and output "logits"; the metadata are its properties."""
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


def to_safetensors(state_dict: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """A safetensors file; the metadata stand in its header, as JSON texts."""
    from safetensors.torch import save

    texts = {key: json.dumps(value) for key, value in {VERSION: 1, **metadata}.items()}
    return save({k: v.contiguous() for k, v in state_dict.items()}, {"format": "pt", **texts})


def check_safetensors(data: bytes, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Reads a safetensors file back.

    Raises:
        UserError: it does not hold the tensors of `state_dict`, bit for bit; `name` is the file's.
    """
    from safetensors.torch import load

    held = load(data)
    differing = sorted(held.keys() ^ state_dict.keys())
    differing += [k for k in held.keys() & state_dict.keys() if not _same(held[k], state_dict[k])]
    if differing:
        raise UserError(
            f"{name} does not hold the checkpoint's {differing[0]}: not written", EXIT_FAILED
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (t.flatten().view(torch.uint8) for t in (a, b))  # as bytes, in which NaN equals NaN
    return torch.equal(a, b)


def read_safetensors(path: str | Path) -> dict:
    """A file that `to_safetensors` wrote, as the checkpoint that it came from.

    One that others wrote is a bare state dict.

    Raises:
        UserError: safetensors is not installed, or the file is damaged.
    """
    check_packages(["safetensors"])
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if VERSION not in texts:
            return state_dict
        fields = {key: json.loads(text) for key, text in texts.items() if key != "format"}
        fields["format"] = fields.pop(VERSION)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a checkpoint") from None
    except (SafetensorError, OSError, ValueError):
        raise UserError(f"{path}: damaged, or not a safetensors file") from None
    return {**fields, "state_dict": state_dict}


def run_onnx(data: bytes) -> Callable[[Tensor], Tensor]:
    """The network in an ONNX file, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def run_pt2(data: bytes) -> Callable[[Tensor], Tensor]:
    """The network in a .pt2 file."""
    return torch.export.load(io.BytesIO(data)).module()


@torch.no_grad()
def largest_difference(
    written: Callable[[Tensor], Tensor],
    network: nn.Module,
    shapes: Sequence[tuple[int, int, int]],
    name: str,
) -> float:
    """Runs both on random images.

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

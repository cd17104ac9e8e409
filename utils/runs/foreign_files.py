"""Reads and writes weights of other programs: files of theirs for torch, and .safetensors.

`torch.load` reads these, still without running their code.
Training scripts leave numpy scalars, `argparse.Namespace` and paths beside the tensors. Their names
are given to one harmless class of this file, so that nothing of numpy's or of the file's is called.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights import FORMAT
from utils.system.errors import EXIT_FAILED, UserError, require

VERSION = "checkpoint_format"  # in the header of .safetensors, where "format" is "pt" by custom
SAVE_WEIGHTS = (
    "in the program that made it, where you trust that, "
    "torch.save(model.state_dict(), 'weights.pth')"
)
PROGRAM = (
    "a program of torch.export, and to read one is to run what it holds; refused. Give the "
    "checkpoint that it was made of, or what export.py CKPT --to onnx writes"
)
EXPORTED = (
    "a file of export.py, which predict.py takes, and main.py -e where it is a classifier's; give "
    "its checkpoint here"
)
OTHER_ENDINGS = {".pt2": PROGRAM, ".onnx": EXPORTED, ".xml": EXPORTED}  # nothing of them is read
OTHER_FORMATS = {  # the first bytes of files that are taken for checkpoints
    b"\x89HDF\r\n\x1a\n": "a Keras or HDF5 file",
    b"\x93NUMPY": "a numpy array",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<!DOCTYPE": "a web page: the download went wrong",
    b"<html": "a web page: the download went wrong",
}


class Unread:
    """Stands for a value beside the weights that is not looked at."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return "a value that was not read"


_MADE = ("scalar", "_reconstruct")
_KINDS = (
    "Bool Int8 UInt8 Int16 UInt16 Int32 UInt32 Int64 UInt64 Float16 Float32 Float64 Complex128 Str"
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
INERT = (
    *("argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in _KINDS.split()),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _MADE),
    *(f"pathlib.{module}{name}" for module in ("", "_local.") for name in _PATHS),
)


def inert_types() -> AbstractContextManager[Any]:
    """Lets `torch.load(weights_only=True)` pass over the plain values of other programs."""
    return torch.serialization.safe_globals([(Unread, name) for name in INERT])


def why_not_weights(path: Path) -> str | None:
    """Returns why a file holds no plain weights, with the remedy; None if not known.

    Nothing is loaded: the names in a zip, its first bytes, and the opcodes of its pickle tell.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(64)
        return next(
            (what for magic, what in OTHER_FORMATS.items() if start.startswith(magic)), None
        )
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] or name for name in archive.namelist()]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return (
            "a TorchScript file, which holds code; refused. Save its weights as a file of plain "
            "tensors: " + SAVE_WEIGHTS.replace("model", f"torch.jit.load({path.name!r})")
        )
    if any(name.endswith((".npy", ".npz")) for name in names):
        return "an archive of numpy arrays, not of torch's tensors"
    if any(name.startswith("models/") or name == "archive_format" for name in names):
        return PROGRAM
    return None


def needs_code(path: Path, error: Exception) -> str:
    """Returns one line on a file of whole objects, such as `torch.save(model, …)` makes.

    Args:
        error: what `torch.load(weights_only=True)` raised; it names the first class that it met.
    """
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    holds = f"an object of {name[1]}" if name else "objects"
    return (
        f"{path}: holds {holds}, which needs code to be loaded, and a stranger's file could abuse "
        f"that; refused. Ask for a file of plain tensors: {SAVE_WEIGHTS}"
    )


def to_safetensors(state_dict: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """Returns a safetensors file's bytes; the metadata stand in its header, as JSON texts."""
    from safetensors.torch import save

    texts = {key: json.dumps(value) for key, value in {VERSION: FORMAT, **metadata}.items()}
    return save({k: v.contiguous() for k, v in state_dict.items()}, {"format": "pt", **texts})


def check_safetensors(data: bytes, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Reads a safetensors file back and compares it with `state_dict`.

    Raises:
        UserError: it does not hold the tensors of `state_dict`, bit for bit; `name` is the file's.
    """
    from safetensors.torch import load

    read = load(data)
    differing = sorted(read.keys() ^ state_dict.keys())
    differing += [k for k in read.keys() & state_dict.keys() if not _same(read[k], state_dict[k])]
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
    """Reads a file that `to_safetensors` wrote, as the checkpoint that it came from.

    One that others wrote is a bare state dict.

    Raises:
        UserError: safetensors is not installed, or the file is damaged.
    """
    require(["safetensors"], f"{path}", "-r requirements-export.txt")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if VERSION not in texts:
            return state_dict
        fields = {key: json.loads(text) for key, text in texts.items() if key != "format"}
        fields["format"] = fields.pop(VERSION)
    except (SafetensorError, OSError, ValueError, RecursionError):  # lists 100,000 deep
        raise UserError(f"{path}: damaged, or not a safetensors file") from None
    return {**fields, "state_dict": state_dict}

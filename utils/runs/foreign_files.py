"""Lets `torch.load` read weights from other programs' files, still without running their code.

Training scripts leave numpy scalars, `argparse.Namespace` and paths beside the tensors. Their names
are given to harmless classes of this file, so that nothing of numpy's or of the file's is called.
What these values are does not matter to a reader of weights.
"""

import argparse
import re
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

SAVE_WEIGHTS = (
    "in the program that made it, where you trust that, "
    "torch.save(model.state_dict(), 'weights.pth')"
)
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


class Settings(argparse.Namespace):
    """Stands for an `argparse.Namespace` of another program: names and plain values."""


def _path(*parts: object) -> str:
    return "/".join(map(str, parts))


def _unread(*_: object) -> Unread:
    return Unread()


_SCALARS = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
_ARRAYS = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
_KINDS = (
    "Bool Int8 UInt8 Int16 UInt16 Int32 UInt32 Int64 UInt64 Float16 Float32 Float64 Complex128 Str"
)
_INERT = {
    "argparse.Namespace": Settings,
    "types.SimpleNamespace": Settings,
    "numpy.dtype": Unread,
    "numpy.ndarray": Unread,
    **{f"numpy.dtypes.{kind}DType": Unread for kind in _KINDS},
    **dict.fromkeys(_SCALARS + _ARRAYS, _unread),
    **{
        f"pathlib.{module}{name}": _path
        for module in ("", "_local.")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    },
}


def inert_types() -> AbstractContextManager[Any]:
    """Lets `torch.load(weights_only=True)` pass over the plain values of other programs."""
    allowed: list[Any] = [(value, name) for name, value in _INERT.items()]
    return torch.serialization.safe_globals(allowed)


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
        return f"an exported program, not a file of weights; {SAVE_WEIGHTS}"
    return None


def needs_code(path: Path, error: Exception) -> str:
    """Returns one line on a file of whole objects, such as `torch.save(model, …)` makes.

    Args:
        error: what `torch.load(weights_only=True)` raised; it names the first class that it met.
    """
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    holds = f"an object of {found[1]}" if found else "objects"
    return (
        f"{path}: holds {holds}, which needs code to be loaded, and a stranger's file could abuse "
        f"that; refused. Ask for a file of plain tensors: {SAVE_WEIGHTS}"
    )

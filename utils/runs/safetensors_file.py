"""Writes weights as a .safetensors file, and reads them back."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.system.errors import EXIT_FAILED, UserError
from utils.system.optional_packages import require

VERSION = "checkpoint_format"  # in the header of .safetensors, where "format" is "pt" by custom


def to_safetensors(state_dict: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """Returns a safetensors file's bytes; the metadata stand in its header, as JSON texts."""
    from safetensors.torch import save

    texts = {key: json.dumps(value) for key, value in {VERSION: 1, **metadata}.items()}
    return save({k: v.contiguous() for k, v in state_dict.items()}, {"format": "pt", **texts})


def check_safetensors(data: bytes, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Reads a safetensors file back and compares it with `state_dict`.

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
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a checkpoint") from None
    except (SafetensorError, OSError, ValueError, RecursionError):  # lists 100,000 deep
        raise UserError(f"{path}: damaged, or not a safetensors file") from None
    return {**fields, "state_dict": state_dict}

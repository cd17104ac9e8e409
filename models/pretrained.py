"""Reads a network from a folder in Hugging Face's form: config.json beside model.safetensors.

`export.py CKPT --to hf` writes such a folder. safetensors reads the weights; only the id of a
repository needs huggingface_hub and a connection. Both are imported where they are used.
"""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .attention import ATTENTIONS, TIMM
from .registry import KWARGS, MODELS, create_model, first_line, is_of_library
from .weights import FIELDS, FORMAT, Network, load_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST_CONFIG = 16 * 2**20  # bytes: a thousand times what 1,000 class names take
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXACT = (torch.float32, torch.float16, torch.bfloat16)  # float32 holds each value of these


def from_pretrained(source: str | PathLike[str], revision: str | None = None) -> Network:
    """Builds the network in a folder, with its weights bit for bit.

    Args:
        source: a folder with config.json and model.safetensors, or OWNER/NAME on huggingface.co.
            Where a folder has that name, it is the folder, and nothing is downloaded.
        revision: branch, tag or commit; for OWNER/NAME alone.

    Returns:
        The network in eval mode on the CPU: images (N, 3, H, W) float32 → logits (N, classes).

    Raises:
        ValueError: one line; nothing is there, a package is missing, or a file is not as it ought
            to be.
    """
    folder = _find_folder(source, revision)
    config = read_config(folder)
    weights = _read_weights(folder / WEIGHTS)
    fields = {name: config[name] for name in FIELDS if name != "model_kwargs"}
    arch, kwargs = fields.pop("arch"), config["model_kwargs"]
    try:
        # First without memory: the sizes are a stranger's, and the file's shapes must agree.
        with torch.device("meta"):
            trial = cast(Network, create_model(arch, **fields, **kwargs))
        load_weights(trial, {name: tensor.to("meta") for name, tensor in weights.items()})
        network = cast(Network, create_model(arch, **fields, **kwargs))
        load_weights(network, weights)
    except (ValueError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{folder}: {first_line(error)}") from None
    return network.eval()


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """Reads config.json: the fields that build the network, and what images are made with.

    Returns:
        arch, attention, ksize, num_classes and model_kwargs as `create_model` takes them; and
        classes (names), img_size (pixels), crop_pct, mean and std, where the file has them.

    Raises:
        ValueError: one line; no such file, or a field that is not of its type.
    """
    path = Path(folder) / CONFIG
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"{path}: more than {LARGEST_CONFIG // 2**20} MB; not a config.json")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a folder that --to hf wrote") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; write the folder again") from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON; write the folder again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON object is wanted, not a {type(config).__name__}")
    if wrong := _wrong_field(config):
        raise ValueError(f"{path}: {wrong}")
    return config


def _wrong_field(config: Mapping[str, Any]) -> str | None:
    """Says in a few words which field keeps the network from being built, or None.

    Whether arch, attention, ksize, num_classes and model_kwargs go together, `create_model` says.
    """
    if lacking := [name for name in ("format", *FIELDS) if name not in config]:
        return f"it lacks {lacking[0]}: it is not a config.json of this project"
    if config["format"] != FORMAT:
        return f"its format is {_short(config['format'])}, not {FORMAT}: update this package"
    names, size = config.get("classes") or [], config.get("img_size", 1)
    classes = config["num_classes"] if type(config["num_classes"]) is int else 0
    right = {
        "arch": config["arch"] in list(MODELS) or is_of_library(str(config["arch"])),
        "attention": config["attention"] in list(ATTENTIONS)
        or str(config["attention"]).startswith(TIMM),
        "ksize": config["ksize"] is None or isinstance(config["ksize"], list),
        "num_classes": classes > 0,
        "model_kwargs": isinstance(config["model_kwargs"], dict)
        and config["model_kwargs"].keys() <= KWARGS,
        "classes": isinstance(names, list)
        and len(names) <= classes
        and all(isinstance(name, str) for name in names),
        "img_size": type(size) is int and size > 0,
        "crop_pct": _are_shares([config.get("crop_pct", 1)], 1),
        "mean": _are_shares(config.get("mean", [1, 1, 1]), 3, or_zero=True),
        "std": _are_shares(config.get("std", [1, 1, 1]), 3),
    }
    wrong = next((name for name, fits in right.items() if not fits), None)
    return None if wrong is None else f"{wrong} cannot be {_short(config[wrong])}"


def _are_shares(values: Any, count: int, or_zero: bool = False) -> bool:
    """Tells whether `values` are so many numbers above 0, or from 0 on, and up to 1."""
    if not isinstance(values, list) or len(values) != count:
        return False
    fit = [type(v) in (int, float) and (0 < v <= 1 or (or_zero and v == 0)) for v in values]
    return all(fit)


def _short(value: Any) -> str:
    """Shows a stranger's value in one line that is safe for a terminal."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"that {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _find_folder(source: str | PathLike[str], revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder here: leave revision out")
        return folder
    if folder.exists() or not _ID.fullmatch(str(source)):
        what = "is a file" if folder.exists() else "no such folder"
        raise ValueError(f"{source}: {what}; give a folder with {CONFIG} and {WEIGHTS}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ValueError(
            f"{source}: no such folder, and to download needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        files = [
            hf_hub_download(str(source), name, revision=revision) for name in (CONFIG, WEIGHTS)
        ]
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{source}: no such folder here, and not downloaded: {first_line(error)}"
        ) from None
    return Path(files[0]).parent


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: needs safetensors: pip install safetensors") from None
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a folder that --to hf wrote")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError):
        raise ValueError(f"{path}: damaged, or not a safetensors file") from None
    for name, tensor in weights.items():
        counts = name.endswith(".num_batches_tracked") and tensor.dtype == torch.int64
        if not counts and tensor.dtype not in _EXACT:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {_short(name)} is {kind}; float32 is wanted")
    return weights

"""The networks for torch.hub.load, by name. Weights come from a path or URL that the caller gives.

examples:
  torch.hub.load(REPOSITORY, "eca_resnet50")                          fresh weights
  torch.hub.load(REPOSITORY, "eca_resnet50", weights="best.pth")      those of a checkpoint
  torch.hub.load(REPOSITORY, "eca_resnet50", num_classes=10, ksize="3557")

REPOSITORY is a clone's folder, with source="local", or "OWNER/NAME" of one on GitHub.
"""

# torch.hub lists every name here without a leading underscore as a network.
import hashlib as _hashlib
import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any
from urllib.parse import unquote as _unquote
from urllib.parse import urlsplit as _urlsplit

import torch as _torch

from models import MODELS as _MODELS
from models import create_model as _create_model
from models.start import first_network as _first_network
from models.weights import describe_weights as _describe_weights
from models.weights import find_state_dict as _find_state_dict
from utils.runs.checkpoint import Checkpoint as _Checkpoint
from utils.runs.checkpoint import CorruptCheckpointError as _CorruptCheckpointError
from utils.system.errors import UserError as _UserError

dependencies = ["torch"]
_SCHEMES = ("http", "https", "file")


def _downloaded(url: str) -> _Path:
    """Returns the file of a URL in torch.hub's cache; downloads it if it is not there yet."""
    name = _Path(_unquote(_urlsplit(url).path)).name or "weights"
    # Two URLs may end in the same name, such as best.pth.
    key = _hashlib.sha256(url.encode()).hexdigest()[:16]
    target = _Path(_torch.hub.get_dir()) / "checkpoints" / f"{key}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {target}", file=_sys.stderr)
        try:
            _torch.hub.download_url_to_file(url, str(target), progress=False)
        except Exception as error:  # what a download raises is open-ended
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"weights={url}: {reason}; check the URL") from None
    return target


def _entry(name: str) -> _Callable[..., _torch.nn.Module]:
    def network(
        weights: str | _Path | None = None,
        num_classes: int | None = None,
        ksize: _Any = None,
        **kwargs: _Any,
    ) -> _torch.nn.Module:
        if kwargs.get("pretrained"):
            raise ValueError(f"{name} downloads nothing unasked: give weights=FILE, a path or URL")
        if weights is None:
            count = 1000 if num_classes is None else num_classes
            return _create_model(name, ksize, count, **kwargs)
        if kwargs.keys() - {"attention"}:
            refused = ", ".join(sorted(kwargs.keys() - {"attention"}))
            raise ValueError(f"{name} with weights takes no {refused}: leave it out")
        is_url = _urlsplit(str(weights)).scheme in _SCHEMES
        path = _downloaded(str(weights)) if is_url else _Path(weights)
        try:
            saved = _Checkpoint.read(path).contents
        except _UserError as error:
            cut = is_url and isinstance(error, _CorruptCheckpointError)
            if cut:  # not taken next time
                path.unlink(missing_ok=True)
            raise ValueError(f"{error}{'; removed from the cache' * cut}") from None
        try:
            if num_classes is None:
                num_classes = _describe_weights(_find_state_dict(saved))["num_classes"]
            built, notes = _first_network(
                name, num_classes, ksize, pretrained=saved, file=str(weights), **kwargs
            )
        except ValueError as error:
            at = "" if str(weights) in str(error) else f"{weights}: "
            raise ValueError(f"{at}{error}") from None
        for note in notes:
            print(note, file=_sys.stderr)
        return built

    network.__name__ = network.__qualname__ = name
    network.__doc__ = f"""Builds {name}.

    Args:
        weights: path or URL of a checkpoint of this project, of the authors' release, or a bare
            state dict; None for fresh weights. Only a URL is downloaded, once, to torch.hub's
            cache. What was loaded and what is new is printed on standard error.
        num_classes: None for the classes of the weights, or 1000 without weights.
        ksize: ECA's kernel sizes, such as "3557"; None for the released ones, or the weights' own.
        **kwargs: attention; without weights also MobileNetV2's width_mult.

    Returns:
        The network, in training mode: images (N, 3, H, W) → logits (N, num_classes).

    Raises:
        ValueError: one line; no such file, or weights that do not fit.
    """
    return network


for _name in _MODELS:
    globals()[_name] = _entry(_name)

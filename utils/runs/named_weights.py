"""Fetches published weights that --pretrained names: by their library's means, into its cache."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.runs.checkpoint import Checkpoint
from utils.system.errors import EXIT_FAILED, UserError, require
from utils.system.text import did_you_mean

TORCHVISION, TIMM = "torchvision", "timm:"


def is_name(source: str) -> bool:
    """Returns whether --pretrained names published weights, and no file."""
    return source == TORCHVISION or source.startswith(TIMM)


def read_weights(source: str, arch: str) -> Checkpoint:
    """Reads the weights of --pretrained; only a name is downloaded, once.

    Args:
        source: a file; "torchvision" for its weights of the same network, without attention; or
            "timm:NAME" for those of a network of timm's.
        arch: of the network that they are for.

    Raises:
        UserError: no such weights, or they cannot be fetched; or as `Checkpoint.read`.
    """
    if not is_name(source):
        return Checkpoint.read(Path(source))
    if source == TORCHVISION:
        return _of_torchvision(re.sub(r"^(eca|se)_|^torchvision:", "", arch))
    return _of_timm(source.removeprefix(TIMM))


def _of_torchvision(name: str) -> Checkpoint:
    from torchvision import models  # slow to import

    name = {"mobilenetv2": "mobilenet_v2"}.get(name, name)
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"--pretrained {TORCHVISION}: it has no {name}; give a file")
    best = models.get_model_weights(name).DEFAULT
    how = {"map_location": "cpu", "check_hash": True, "weights_only": True, "progress": False}
    return _fetched(f"{name}'s {best.name} of torchvision", best.url, best.get_state_dict, how)


def _of_timm(name: str) -> Checkpoint:
    require(("timm",), f"--pretrained {TIMM}{name}", "timm")
    import timm

    plain, known = name.partition(".")[0], timm.list_models(pretrained=True)
    networks = {other.partition(".")[0] for other in known}
    if plain not in networks:
        hint = did_you_mean(plain, sorted(networks)) or "; timm.list_models(pretrained=True)"
        raise UserError(f"--pretrained {TIMM}{name}: timm has no weights of that name{hint}")
    try:
        settings: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the tag behind the point
        tags = ", ".join(other for other in known if other.startswith(f"{plain}."))
        raise UserError(f"--pretrained {TIMM}{name}: {error} Give one of {tags}") from None
    where = f"https://huggingface.co/{settings.hf_hub_id}/resolve/main/model.safetensors"

    timm.models.set_pretrained_check_hash()  # or a cut download would be cached

    def fetch() -> Mapping[str, Tensor]:
        state_dict: Mapping[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
        return state_dict

    return _fetched(f"timm's {name}", where if settings.hf_hub_id else settings.url, fetch, {})


def _fetched(
    what: str, url: str, fetch: Callable[..., Mapping[str, Tensor]], how: Mapping[str, Any]
) -> Checkpoint:
    """Calls `fetch(**how)`, and returns its weights under the name `what`."""
    try:
        return Checkpoint.of(Path(what), dict(fetch(**how)))
    except MemoryError:
        raise
    except Exception as error:  # what a download raises is open-ended
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / (url or "").rpartition("/")[2]
        if url and cached.is_file():  # by a program that did not compare its checksum
            raise UserError(
                f"{cached}: damaged ({reason[:200]}); remove it, and start again", EXIT_FAILED
            ) from None
        raise UserError(
            f"{what}: not downloaded ({reason[:200]}); fetch {url} where there is a network, and "
            "give that file with --pretrained",
            EXIT_FAILED,
        ) from None

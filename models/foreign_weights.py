"""Finds weights in files of other programs, and gives them this project's names.

Training scripts wrap weights in dicts of several names, put prefixes before every key, and leave
counters among the tensors; timm and mmclassification have other names for some layers. This file
holds what is known of them. Each change is described in one note for the user.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

# Where the weights of a file are, the averaged ones first, as timm's own loader takes them.
PLACES = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
)
PREFIXES = ("model.", "net.", "network.", "backbone.", "encoder.")
STEMS = ("conv1.weight", "features.0.0.weight", "conv_stem.weight")  # of the networks known here
COUNTERS = re.compile(r"(^|\.)(total_ops|total_params)$|^n_averaged$")  # of thop, of torch's SWA
_TIMM_ECA = re.compile(r"(layer\d\.\d+)\.se\.conv\.weight$")
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)$")
_TIMM_HEAD = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.18.0",
    "bn2": "features.18.1",
    "classifier": "classifier.1",
}
# timm's layers of MobileNetV2's blocks; the first block does not expand.
_TIMM_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
_TIMM_OTHERS = {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "conv_pwl": "2",
    "bn3": "3",
}


def find_weights(checkpoint: Any) -> tuple[Any, list[str]]:
    """Finds the weights in a file of another program; returns them, and notes for the user."""
    path: list[str] = []
    found = checkpoint
    while isinstance(found, Mapping):
        inside = [k for k in PLACES if isinstance(found.get(k), Mapping) and found[k]]
        if not inside:
            break
        found, others = found[inside[0]], inside[1:]
        path.append(inside[0] + (f" (not {', '.join(others)})" if others else ""))
    if path in ([], ["state_dict"]):  # bare weights, and the released files'
        return found, []
    return found, [f"took what stands under {', '.join(path)}"]


def plain_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the same tensors under this project's names, and notes on what was renamed.

    Unknown names are kept: the function that loads the weights reports names that do not fit.

    Raises:
        ValueError: two tensors would get the same name.
    """
    done = []
    plain = {name: t for name, t in weights.items() if not COUNTERS.search(name)}
    if counters := weights.keys() - plain.keys():
        done.append(f"dropped {len(counters)} {_last_parts(counters)}")
    while prefix := _prefix(plain):
        plain = _renamed(plain, lambda name: name.removeprefix(prefix))
        done.append(f"took {prefix} off the names")
    for rename, what in (
        (_of_mmclassification, "head.fc is the last layer"),
        (_of_timms_eca, ".se.conv is .eca.conv"),
        (_of_timms_mobilenet, "timm's names of MobileNetV2's layers are torchvision's"),
    ):
        new = rename(plain)
        if new.keys() != plain.keys():
            done.append(what)
        plain = new
    return plain, done


def _prefix(weights: Mapping[str, Tensor]) -> str | None:
    """Finds the prefix in `PREFIXES` that the name of the first layer begins with."""
    found = (p for p in PREFIXES for stem in STEMS if p + stem in weights)
    return next(found, None)


def _of_mmclassification(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "conv1.weight" not in weights:
        return dict(weights)
    return _renamed(weights, lambda name: re.sub(r"^head\.fc\.", "fc.", name))


def _of_timms_eca(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # One kernel for all channels: SE's layers there are called fc1 and fc2, or conv of other shape.
    kernels = {n for n, t in weights.items() if _TIMM_ECA.match(n) and t.shape[:2] == (1, 1)}
    return _renamed(
        weights, lambda name: name.replace(".se.", ".eca.") if name in kernels else name
    )


def _of_timms_mobilenet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "conv_stem.weight" not in weights or "blocks.0.0.conv_dw.weight" not in weights:
        return dict(weights)
    blocks = sorted({(int(m[1]), int(m[2])) for m in map(_TIMM_BLOCK.match, weights) if m})

    def rename(name: str) -> str:
        layer, _, parameter = name.rpartition(".")
        if layer in _TIMM_HEAD:
            return f"{_TIMM_HEAD[layer]}.{parameter}"
        if match := _TIMM_BLOCK.match(name):
            number = blocks.index((int(match[1]), int(match[2])))
            table = _TIMM_OTHERS if number else _TIMM_FIRST
            if match[3] in table:
                return f"features.{number + 1}.conv.{table[match[3]]}.{match[4]}"
        return name

    return _renamed(weights, rename)


def _renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    for old, tensor in weights.items():
        name = rename(old)
        if name in new:
            raise ValueError(f"the weights hold {name} twice, under two names")
        new[name] = tensor
    return new


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))

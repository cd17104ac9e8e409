"""The registry of the networks: their names, and the function that builds one by its name."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .classifier import Classifier, FeatureMaps, Indices, Ksize
from .eca_mobilenetv2 import eca_mobilenetv2, mobilenetv2, se_mobilenetv2
from .eca_resnet import (
    eca_resnet18,
    eca_resnet34,
    eca_resnet50,
    eca_resnet101,
    eca_resnet152,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    se_resnet18,
    se_resnet34,
    se_resnet50,
    se_resnet101,
    se_resnet152,
)

MODELS: dict[str, Callable[..., Classifier]] = {
    "eca_resnet18": eca_resnet18,
    "eca_resnet34": eca_resnet34,
    "eca_resnet50": eca_resnet50,
    "eca_resnet101": eca_resnet101,
    "eca_resnet152": eca_resnet152,
    "eca_mobilenetv2": eca_mobilenetv2,
    "eca_mobilenet_v2": eca_mobilenetv2,
    "se_resnet18": se_resnet18,
    "se_resnet34": se_resnet34,
    "se_resnet50": se_resnet50,
    "se_resnet101": se_resnet101,
    "se_resnet152": se_resnet152,
    "se_mobilenetv2": se_mobilenetv2,
    "se_mobilenet_v2": se_mobilenetv2,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "mobilenetv2": mobilenetv2,
    "mobilenet_v2": mobilenetv2,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, in the order of `MODELS`.

    Args:
        pattern: what the whole name must match, as in a shell: `eca_*50*`. No match gives an empty
            list.
    """
    return [name for name in MODELS if fnmatch.fnmatchcase(name, pattern)]


def create_model(
    name: str,
    ksize: Ksize = None,
    num_classes: int = 1000,
    *,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: Indices = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds the network `name`, with fresh weights.

    Args:
        name: a key of `MODELS`; `list_models` shows them.
        ksize: ECA's kernel sizes as `--ksize` takes them, or a sequence; None for the released
            ones, or for a network without ECA.
        num_classes: rows of the last layer; 0 for none, so that the network puts out features.
        pretrained: False. Nothing is downloaded here; True is refused with what loads a file.
        features_only: a `FeatureMaps` in the place of the network: its feature maps, as a list.
        out_indices: which of them, finest first; only with `features_only`.
        **kwargs: the constructor's other arguments: `attention`, MobileNetV2's `width_mult`.

    Raises:
        ValueError: one line, for an unknown name or a value that will not do.
    """
    if name not in MODELS:
        raise ValueError(f"unknown network {name!r}; {_hint(str(name))}")
    if pretrained:
        raise ValueError(
            f"create_model gives {name} fresh weights and downloads none: train from a file with"
            f" `python main.py -a {name} --pretrained FILE`, or load it with"
            " models.weights.network_from_checkpoint(torch.load(FILE))"
        )
    constructor = MODELS[name]
    if foreign := kwargs.keys() - inspect.signature(constructor).parameters:
        raise ValueError(f"{name} takes no {', '.join(sorted(foreign))}: leave it out")
    if not features_only and out_indices is not None:
        raise ValueError("out_indices is for features_only=True: leave it out")
    if features_only:
        return FeatureMaps(constructor(ksize=ksize, num_classes=0, **kwargs), out_indices)
    return constructor(ksize=ksize, num_classes=num_classes, **kwargs)


def _hint(name: str) -> str:
    """What to write in the place of an unknown name: close ones, or how to see them all."""
    if found := list_models(name):  # none of them is the name itself, so it is a pattern
        return f"models.list_models({name!r}) finds {', '.join(found)}"
    plain = {"".join(filter(str.isalnum, known)): known for known in MODELS}
    wanted = "".join(filter(str.isalnum, name.lower()))
    if close := [plain[match] for match in difflib.get_close_matches(wanted, plain)]:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(MODELS)}; models.list_models('eca_*50*') finds some by a pattern"

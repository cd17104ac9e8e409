"""The networks, by name. A name that ends in `mobilenet_v2` is another spelling of the same."""

import difflib
import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn

from .construction import Ksize
from .eca_mobilenetv2 import MobileNetV2, eca_mobilenetv2, mobilenetv2, se_mobilenetv2
from .eca_module import ECALayer, adaptive_kernel_size, parse_ksize
from .eca_resnet import (
    ResNet,
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
from .fused.block_tail import set_fused
from .fused.describe import describe_tails
from .fused.dispatch import why_not_triton
from .inference import optimise_for_inference
from .insertion import Insertion, add_eca

__all__ = [
    "MODELS",
    "ECALayer",
    "Insertion",
    "MobileNetV2",
    "ResNet",
    "adaptive_kernel_size",
    "add_eca",
    "create_model",
    "describe_tails",
    "from_pretrained",
    "optimise_for_inference",
    "parse_ksize",
    "set_fused",
    "why_not_triton",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
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


def create_model(
    name: str, ksize: Ksize = None, num_classes: int = 1000, **kwargs: Any
) -> nn.Module:
    """Builds the network `name`, with fresh weights.

    Args:
        name: a key of `MODELS`.
        ksize: ECA's kernel sizes as `--ksize` takes them, or a sequence; None for the released
            ones, or for a network without ECA.
        num_classes: at least 1.
        **kwargs: the constructor's other arguments: `attention`, MobileNetV2's `width_mult`.

    Raises:
        ValueError: one line, for an unknown name or a value that will not do.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(MODELS)}"
        raise ValueError(f"unknown network {name!r}; {hint}")
    constructor = MODELS[name]
    if foreign := kwargs.keys() - inspect.signature(constructor).parameters:
        raise ValueError(f"{name} takes no {', '.join(sorted(foreign))}: leave it out")
    return constructor(ksize=ksize, num_classes=num_classes, **kwargs)


def from_pretrained(source: str | PathLike[str], revision: str | None = None) -> nn.Module:
    """Builds the network in a folder of Hugging Face's form, or of a repository there.

    Args:
        source: a folder that `export.py --to hf` wrote, or OWNER/NAME on huggingface.co. Where a
            folder has that name, it is the folder, and nothing is downloaded.
        revision: branch, tag or commit; for OWNER/NAME alone.

    Returns:
        The network in eval mode on the CPU: images (N, 3, H, W) float32 → logits (N, classes).

    Raises:
        ValueError: one line; see `models.pretrained`.
    """
    from . import pretrained  # which itself needs this module whole

    return pretrained.from_pretrained(source, revision)

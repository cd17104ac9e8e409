"""The networks, by name. A name that ends in `mobilenet_v2` is another spelling of the same."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn

from .classifier import Classifier, FeatureMaps, Indices
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
from .layer_groups import freeze, layer_scales
from .stochastic_depth import set_drop_path

__all__ = [
    "MODELS",
    "Classifier",
    "ECALayer",
    "FeatureMaps",
    "Insertion",
    "MobileNetV2",
    "ResNet",
    "adaptive_kernel_size",
    "add_eca",
    "create_model",
    "describe_tails",
    "freeze",
    "from_pretrained",
    "layer_scales",
    "list_models",
    "optimise_for_inference",
    "parse_ksize",
    "register_with_timm",
    "set_drop_path",
    "set_fused",
    "why_not_triton",
]

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


def __dir__() -> list[str]:
    """What `dir(models)` and tab completion show: the public names alone."""
    return sorted(__all__)


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


def register_with_timm() -> list[str]:
    """Makes `timm.create_model("eca_net_resnet50")` and its like work, and returns these names.

    Raises:
        ValueError: timm is not installed.
    """
    from .timm_registry import register  # it needs weights.py, which needs this file

    return register(MODELS)


def _hint(name: str) -> str:
    """What to write in the place of an unknown name: close ones, or how to see them all."""
    if found := list_models(name):  # none of them is the name itself, so it is a pattern
        return f"models.list_models({name!r}) finds {', '.join(found)}"
    plain = {"".join(filter(str.isalnum, known)): known for known in MODELS}
    wanted = "".join(filter(str.isalnum, name.lower()))
    if close := [plain[match] for match in difflib.get_close_matches(wanted, plain)]:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(MODELS)}; models.list_models('eca_*50*') finds some by a pattern"

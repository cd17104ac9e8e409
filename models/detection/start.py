"""What a detection run begins with: a new detector and its backbone's weights, or a saved one's."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torchvision.models.detection import FasterRCNN, RetinaNet

from .. import create_model
from ..construction import Ksize
from .detectors import create_detector, load_backbone


def start_detector(
    arch: str,
    backbone: str,
    ksize: Ksize,
    num_classes: int,
    backbone_weights: Any = None,
    norm: str | None = None,
    trainable_layers: int | None = None,
    **settings: Any,
) -> tuple[FasterRCNN | RetinaNet, str]:
    """A detector with its first weights, and one line on those of its backbone.

    Args:
        arch, backbone, ksize, num_classes, **settings: as in `create_detector`.
        backbone_weights: any file that `models.weights` reads; None for fresh weights.
        norm: None for "eval" with weights, "bn" without.
        trainable_layers: None for 3 with weights, 5 without.

    Raises:
        ValueError: one line, for a value that will not do, or weights that do not fit.
    """
    pretrained = backbone_weights is not None
    norm = norm or ("eval" if pretrained else "bn")
    if trainable_layers is None:
        trainable_layers = 3 if pretrained else 5
    network = create_detector(
        arch, backbone, ksize, num_classes, trainable_layers=trainable_layers, norm=norm, **settings
    )
    if pretrained:
        return network, f"  {load_backbone(network, backbone_weights)}"
    if norm in ("eval", "frozen"):
        return network, (
            f"! --norm {norm} without --backbone-weights: no statistics have been measured yet"
        )
    return network, f"! no --backbone-weights: the backbone starts from nothing, with --norm {norm}"


def refuse_another_network(checkpoint: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises where `asked` is another network than the checkpoint's.

    Args:
        checkpoint: of `describe_detector`; `model_kwargs` that it lacks, as an imported one does,
            are `create_detector`'s defaults.
        asked: arch, backbone, ksize, norm, trainable_layers, as in `create_detector`; None where
            nothing is asked. And legacy; False is no question.

    Raises:
        ValueError: one line with the flags to leave out.
    """
    parameters = inspect.signature(create_detector).parameters
    held = {name: parameter.default for name, parameter in parameters.items()}
    held |= {name: checkpoint.get(name) for name in ("arch", "backbone", "ksize")}
    held |= checkpoint.get("model_kwargs", {})
    plain = ("arch", "backbone", "norm", "trainable_layers")
    differing = [name for name in plain if asked[name] not in (None, held[name])]
    if asked["ksize"] is not None:
        attention = None if asked["backbone"] else checkpoint.get("attention")
        own = {} if attention is None else {"attention": attention}
        with torch.device("meta"):  # costs nothing, and knows what "adaptive" comes to
            network = create_model(asked["backbone"] or held["backbone"], asked["ksize"], 1, **own)
        if network.ksize != tuple(held["ksize"] or ()):
            differing.append("ksize")
    flags = [f"--{name.replace('_', '-')} {asked[name]}" for name in differing]
    if asked["legacy"] and not held["legacy"]:
        flags.append("--legacy")
    if flags:
        raise ValueError(
            f"holds {held['arch']} on {held['backbone']}, ksize {held['ksize']}, norm "
            f"{held['norm']}: leave {', '.join(flags)} out, or start a new run"
        )

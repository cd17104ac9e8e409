"""Makes the detector that a run begins with: with its backbone's weights, or a saved detector's."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchvision.models.detection import FasterRCNN, RetinaNet

from .. import create_model
from ..construction import Ksize
from ..weights import FORMAT, find_state_dict
from .detectors import create_detector, describe_detector, load_backbone

# The layers with outputs for each class: they mean nothing for other classes.
CLASS_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
    "head.classification_head.cls_logits.",
)


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
    """Builds a detector with its first weights; returns it and a line about its backbone.

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
            f"! norm {norm} without weights of the backbone: no statistics have been measured yet"
        )
    return network, f"! no weights of the backbone: it starts from nothing, with norm {norm}"


def start_from_detector(
    checkpoint: Mapping[str, Any],
    num_classes: int,
    classes: Sequence[str],
    norm: str | None = None,
    trainable_layers: int | None = None,
    **settings: Any,
) -> tuple[FasterRCNN | RetinaNet, str]:
    """Builds the detector that a checkpoint holds for other classes; returns it and a line.

    Args:
        checkpoint: as in `load_detector`. The detector, its backbone and its geometry are those of
            the checkpoint.
        num_classes: outputs for each box, as in `create_detector`.
        classes: names of the new detector's classes, in the order of its labels.
        norm: None for "eval".
        trainable_layers: None for 3.
        **settings: as in `create_detector`, such as min_size.

    Raises:
        ValueError: one line, see `load_detector`.
    """
    if checkpoint.get("format") != FORMAT or "backbone" not in checkpoint:
        raise ValueError("not a detector's checkpoint: give one of detect_main.py")
    own = {**_all_settings(checkpoint), "norm": norm or "eval"}
    own["trainable_layers"] = 3 if trainable_layers is None else trainable_layers
    names = ("arch", "backbone", "ksize", "attention")
    fields: dict[str, Any] = {name: checkpoint.get(name) for name in names}
    detector = create_detector(**fields, num_classes=num_classes, **{**own, **settings})
    return detector, f"  {load_detector(detector, checkpoint, classes)}"


def load_detector(
    detector: FasterRCNN | RetinaNet, checkpoint: Mapping[str, Any], classes: Sequence[str]
) -> str:
    """Copies a detector's weights into a detector of other classes, all or nothing.

    Args:
        detector: from `create_detector`, for `classes`.
        checkpoint: of `describe_detector`, with "format", "state_dict" and its "classes". Its
            layers with an output for each class are left out where the classes differ.
        classes: names of the new detector's classes, in the order of its labels.

    Returns:
        One sentence that says what was kept and what is fresh.

    Raises:
        ValueError: one line, for another detector, backbone or geometry, or weights that do not
            fit.
    """
    if checkpoint.get("format") != FORMAT or "arch" not in checkpoint:
        raise ValueError("not a detector's checkpoint: give one of detect_main.py")
    own = describe_detector(detector)
    held = {**checkpoint, **_all_settings(checkpoint)}
    own |= own["model_kwargs"]
    # trained with other anchors or another geometry, weights fit and find nothing
    for name in ("arch", "backbone", "attention", "legacy", "anchor_scale", "mask_pool"):
        if name == "anchor_scale" and held[name] is None:
            held[name] = 4 if own["arch"] == "retinanet" else 8  # create_detector's own choice
        if held.get(name) != own[name]:
            raise ValueError(f"holds {name} {held.get(name)}, not {own[name]}: give the same")
    weights, target = find_state_dict(checkpoint), detector.state_dict()
    fresh = set()
    if list(checkpoint.get("classes") or ()) != list(classes):
        fresh = {name for name in target if name.startswith(CLASS_LAYERS)}
    kept = {name: value for name, value in weights.items() if name not in fresh}
    for name, value in target.items():
        counter = name.endswith(".num_batches_tracked")
        if name in kept and kept[name].shape != value.shape:
            shapes = f"{list(kept[name].shape)}, not {list(value.shape)}"
            raise ValueError(f"the weights do not fit {own['arch']}: {name} is {shapes}")
        if name not in kept and name not in fresh and not counter:
            raise ValueError(f"the weights do not fit {own['arch']}: {name} is missing")
    if foreign := kept.keys() - target.keys():
        raise ValueError(f"the weights do not fit {own['arch']}: {min(foreign)} is unknown")
    detector.load_state_dict(kept, strict=False)
    said = f"{len(kept)} tensors of a trained detector kept"
    return f"{said}; {len(fresh)} of the class layers fresh" if fresh else f"{said}, same classes"


def _all_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint's `model_kwargs`, with `create_detector`'s default for each it lacks."""
    parameters = inspect.signature(create_detector).parameters
    settings = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name in ("trainable_layers", "norm", "legacy", "anchor_scale", "mask_pool", "width")
    }
    return {**settings, **checkpoint.get("model_kwargs", {})}


def refuse_another_network(checkpoint: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises a ValueError if `asked` is another network than the checkpoint's.

    Args:
        checkpoint: of `describe_detector`; `model_kwargs` that it lacks, as an imported one does,
            are `create_detector`'s defaults.
        asked: arch, backbone, ksize, norm, trainable_layers and legacy, as in `create_detector`;
            None, and False for legacy, where the user asks for nothing.

    Raises:
        ValueError: one line with the arguments to leave out.
    """
    held: dict[str, Any] = {name: checkpoint.get(name) for name in ("arch", "backbone", "ksize")}
    held |= _all_settings(checkpoint)
    plain = ("arch", "backbone", "norm", "trainable_layers")
    differing = [name for name in plain if asked[name] not in (None, held[name])]
    if asked["ksize"] is not None:
        attention = None if asked["backbone"] else checkpoint.get("attention")
        own = {} if attention is None else {"attention": attention}
        with torch.device("meta"):  # costs nothing, and knows what "adaptive" comes to
            network = create_model(asked["backbone"] or held["backbone"], asked["ksize"], 1, **own)
        if network.ksize != tuple(held["ksize"] or ()):
            differing.append("ksize")
    others = [f"`{name}={asked[name]}`" for name in differing]
    if asked["legacy"] and not held["legacy"]:
        others.append("`legacy=True`")
    if others:
        raise ValueError(
            f"holds {held['arch']} on {held['backbone']}, ksize {held['ksize']}, norm "
            f"{held['norm']}: leave {', '.join(others)} out, or start a new run"
        )

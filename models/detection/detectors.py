"""Faster R-CNN, Mask R-CNN and RetinaNet on a feature pyramid over any ResNet of this project.

The detectors are torchvision's, its parameter names included. Their classes, anchors, P6 on C5 and
the first values of their heads are those of the published COCO table. Below the constructors: how
they are built, weights in and out, and what a run begins with.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..classifier import ArgumentError, Ksize
from ..eca_resnet import ResNet
from ..registry import create_model
from ..weights import FORMAT, find_state_dict, load_weights, strip_prefixes
from .layers import DetectorTransform, PyramidAnchors, compute_in_float32, freeze
from .mmdet_legacy import (
    LegacyAnchors,
    LegacyBoxCoder,
    LegacyP6P7,
    LegacyRetinaNet,
    LegacyRoIAlign,
    LegacyRoIHeads,
    LegacyRPN,
    LegacyTransform,
)

DETECTORS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet}
# The label of a data set's first category: the R-CNNs keep 0 for background.
FIRST_LABEL = {"faster_rcnn": 1, "mask_rcnn": 1, "retinanet": 0}
# The keys of the dict that a detector returns in training.
LOSSES = {
    "faster_rcnn": ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"),
    "mask_rcnn": (
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    ),
    "retinanet": ("classification", "bbox_regression"),
}
# The layers with outputs for each class: they mean nothing for other classes.
CLASS_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
    "head.classification_head.cls_logits.",
)
# Where the authors' detectors leave the kernel sizes of their ImageNet weights.
DETECTOR_KSIZE = {
    ("faster_rcnn", "eca_resnet50"): "5555",
    ("mask_rcnn", "eca_resnet50"): "3377",
    ("retinanet", "eca_resnet50"): "3377",
}


def create_detector(
    arch: str,
    backbone: str = "eca_resnet50",
    ksize: Ksize = None,
    num_classes: int | None = None,
    attention: str | None = None,
    trainable_layers: int = 3,
    norm: str = "eval",
    legacy: bool = False,
    anchor_scale: float | None = None,
    mask_pool: int = 14,
    width: int = 256,
    **settings: Any,
) -> FasterRCNN | RetinaNet:
    """Builds a detector with fresh weights. The defaults are the published table's networks.

    Args:
        arch: a key of `DETECTORS`.
        backbone: the name of a ResNet in `models.MODELS`.
        ksize: ECA's kernel sizes; None for the published ones of this detector and backbone.
        num_classes: outputs for each box: FIRST_LABEL + the number of categories. For COCO that is
            81 for the R-CNNs, which count the background, and 80 for RetinaNet.
        attention: another attention in the backbone's blocks; None for the backbone's own.
        trainable_layers: how much of the backbone trains. 3: layer2 to layer4; 4: layer1 too; 5:
            all of it; 0: nothing.
        norm: see `layers.set_norm`.
        legacy: mmdetection v1's geometry, for weights that were trained with it.
        anchor_scale: an anchor's side in strides of its level; None for 8, RetinaNet 4 (times 1,
            2^(1/3) and 2^(2/3)).
        mask_pool: side of the regions that Mask R-CNN's mask head sees; its masks have twice that.
        width: channels of the pyramid and the heads; the box head has 4 · width hidden units.
        **settings: the torchvision class's other arguments, such as `min_size`.

    Returns:
        torchvision's detector. It takes a list of (3, H, W) images in 0…1, in training with
        targets, and gives a dict of losses, or one dict of boxes, labels, scores (and masks) per
        image. `arch`, `backbone_arch`, `attention`, `ksize`, `num_classes` and `model_kwargs`
        suffice to build it again.

    Raises:
        ValueError: one line; an argument has a value that it cannot have.
    """
    _check_settings(arch, num_classes, legacy, settings)
    num_classes = num_classes or 80 + FIRST_LABEL[arch]
    network = _make_resnet(arch, backbone, ksize, attention)
    freeze(network, trainable_layers, norm)
    anchor_scale = anchor_scale or (4 if arch == "retinanet" else 8)
    if arch == "retinanet":
        detector = _build_retinanet(network, num_classes, width, anchor_scale, legacy, settings)
    else:
        heads = _make_heads(arch, num_classes, width, mask_pool, legacy)
        detector = _build_rcnn(arch, network, heads, width, anchor_scale, legacy, settings)
    own = {"trainable_layers": trainable_layers, "norm": norm, "legacy": legacy}
    own |= {"anchor_scale": anchor_scale, "mask_pool": mask_pool, "width": width, **settings}
    detector.arch, detector.backbone_arch, detector.num_classes = arch, backbone, num_classes
    detector.attention, detector.ksize = network.attention, network.ksize
    detector.model_kwargs = own
    return detector


def _check_settings(
    arch: str, num_classes: int | None, legacy: bool, settings: Mapping[str, Any]
) -> None:
    if arch not in DETECTORS:
        raise ValueError(f"unknown detector {arch!r}: use one of {', '.join(DETECTORS)}")
    if num_classes is not None and num_classes <= FIRST_LABEL[arch]:
        raise ArgumentError(
            f"{arch} has no category to find with `num_classes={num_classes}`: 81 is COCO",
            num_classes=num_classes,
        )
    # RetinaNet hands what it does not know to its transform, which drops it without a word.
    known = inspect.signature(DETECTORS[arch]).parameters.keys() | {"size_divisible", "fixed_size"}
    for name in settings.keys() - known:
        raise ValueError(f"{arch} has no setting {name!r}: give one such as min_size")
    if legacy and settings.get("fixed_size") is not None:
        raise ValueError("fixed_size: mmdetection v1's geometry keeps proportions; give min_size")


def _make_resnet(arch: str, backbone: str, ksize: Ksize, attention: str | None) -> ResNet:
    if ksize is None and attention in (None, "eca"):
        ksize = DETECTOR_KSIZE.get((arch, backbone))
    chosen: dict[str, Any] = {} if attention is None else {"attention": attention}
    network = create_model(backbone, ksize, num_classes=1, **chosen)
    if not isinstance(network, ResNet):
        raise ValueError(f"a detector takes a ResNet such as eca_resnet50, not {backbone!r}")
    return network


def _build_retinanet(
    network: ResNet,
    num_classes: int,
    width: int,
    anchor_scale: float,
    legacy: bool,
    settings: Mapping[str, Any],
) -> RetinaNet:
    strides = (8, 16, 32, 64, 128)
    octaves = [2 ** (i / 3) for i in range(3)]
    # torchvision cuts the sizes between the powers of two to whole pixels.
    cut = float if legacy else int
    sizes = [tuple(cut(anchor_scale * stride * octave) for octave in octaves) for stride in strides]
    detector = (LegacyRetinaNet if legacy else RetinaNet)(
        _pyramid(network, (2, 3, 4), width, legacy),
        num_classes,
        anchor_generator=(LegacyAnchors if legacy else PyramidAnchors)(sizes, strides),
        **{"detections_per_img": 100, **settings},
    )
    compute_in_float32(detector.head.classification_head, "cls_logits")
    compute_in_float32(detector.head.regression_head, "bbox_reg")
    detector.transform = _transform(detector.transform, legacy)
    if legacy:
        detector.box_coder = LegacyBoxCoder(detector.box_coder.weights)
    return detector


def _build_rcnn(
    arch: str,
    network: ResNet,
    heads: Mapping[str, nn.Module],
    width: int,
    anchor_scale: float,
    legacy: bool,
    settings: Mapping[str, Any],
) -> FasterRCNN:
    strides = (4, 8, 16, 32, 64)
    sizes = [(anchor_scale * stride,) for stride in strides]
    anchors = (LegacyAnchors if legacy else PyramidAnchors)(sizes, strides)
    pyramid = _pyramid(network, (1, 2, 3, 4), width, legacy)
    detector = DETECTORS[arch](pyramid, **{"rpn_anchor_generator": anchors, **settings, **heads})
    rpn, roi_heads = detector.rpn, detector.roi_heads
    _initialise_box_head(roi_heads)
    compute_in_float32(rpn.head, "cls_logits", "bbox_pred")
    compute_in_float32(roi_heads.box_predictor, "cls_score", "bbox_pred")
    if arch == "mask_rcnn":
        nn.init.normal_(roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.01)
        compute_in_float32(roi_heads.mask_predictor, "mask_fcn_logits")
    detector.transform = _transform(detector.transform, legacy)
    if legacy:
        # torchvision builds both itself; the subclasses add methods and no state
        rpn.__class__, roi_heads.__class__ = LegacyRPN, LegacyRoIHeads
        for part in (rpn, roi_heads):
            part.box_coder = LegacyBoxCoder(part.box_coder.weights)
    return detector


def _transform(theirs: GeneralizedRCNNTransform, legacy: bool) -> DetectorTransform:
    return (LegacyTransform if legacy else DetectorTransform)(
        theirs.min_size,
        theirs.max_size,
        theirs.image_mean,
        theirs.image_std,
        theirs.size_divisible,
        theirs.fixed_size,
    )


def _pyramid(network: ResNet, levels: Sequence[int], width: int, legacy: bool) -> BackboneWithFPN:
    deepest = network.num_features
    extra = LastLevelMaxPool()
    if 1 not in levels:  # RetinaNet: P6 comes from C5, not from P5
        extra = (LegacyP6P7 if legacy else LastLevelP6P7)(deepest, width)
    return BackboneWithFPN(
        network,
        {f"layer{level}": str(i) for i, level in enumerate(levels)},
        [deepest >> (4 - level) for level in levels],
        width,
        extra,
    )


def _make_heads(
    arch: str, num_classes: int, width: int, mask_pool: int, legacy: bool
) -> dict[str, nn.Module]:
    """Makes the R-CNNs' heads as torchvision does, but of any width, by its arguments' names."""
    heads = {
        "box_head": TwoMLPHead(width * 7**2, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, num_classes),
    }
    if legacy:
        heads["box_roi_pool"] = LegacyRoIAlign(7)
    if arch == "mask_rcnn":
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], mask_pool, 2)
        heads["mask_roi_pool"] = LegacyRoIAlign(mask_pool) if legacy else pool
        heads["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
        heads["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes)
    return heads


def _initialise_box_head(heads: RoIHeads) -> None:
    """Initialises the box head as mmdetection does.

    torch's own initialisation makes the signal three times weaker in two layers. A network without
    pretrained weights then loses its first hundred steps.
    """
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer, std in (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 1e-3),
    ):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def load_backbone(detector: FasterRCNN | RetinaNet, checkpoint: Any) -> str:
    """Copies classification weights into the detector's backbone, all or nothing.

    Args:
        detector: from `create_detector`.
        checkpoint: any file that `models.weights` reads; the classifier in it is left out.

    Returns:
        One sentence that says what was done.

    Raises:
        ValueError: one line, for missing or foreign names, other shapes, or another ksize.
    """
    network = _make_resnet(
        detector.arch, detector.backbone_arch, detector.ksize, detector.attention
    )
    head = {name: value for name, value in network.state_dict().items() if name.startswith("fc.")}
    load_weights(network, {**find_state_dict(checkpoint), **head})
    loaded, body = network.state_dict(), detector.backbone.body
    body.load_state_dict({name: loaded[name] for name in body.state_dict()})
    return f"Loaded {len(body.state_dict())} tensors into the backbone; its fc is not used."


def describe_detector(detector: FasterRCNN | RetinaNet) -> dict[str, Any]:
    """Returns the fields of a checkpoint from which `detector_from_checkpoint` builds it again."""
    return {
        "arch": detector.arch,
        "backbone": detector.backbone_arch,
        "attention": detector.attention,
        "ksize": list(detector.ksize) if detector.ksize else None,
        "num_classes": detector.num_classes,
        "model_kwargs": dict(detector.model_kwargs),
    }


def detector_from_checkpoint(
    checkpoint: Mapping[str, Any], **settings: Any
) -> FasterRCNN | RetinaNet:
    """Builds the detector of one of this project's checkpoints, with its weights.

    Args:
        checkpoint: the fields of `describe_detector`, "format" and "state_dict".
        **settings: replace the checkpoint's `model_kwargs`, such as `min_size`.

    Raises:
        ValueError: one line; it is no such checkpoint, or its weights do not fit.
    """
    names = ("format", "arch", "backbone", "attention", "ksize", "num_classes", "model_kwargs")
    missing = [name for name in (*names, "state_dict") if name not in checkpoint]
    if missing:
        raise ValueError(
            f"not a detector's checkpoint, as it lacks {missing[0]}: give one of detect_main.py"
        )
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"checkpoint format {checkpoint['format']!r} is not {FORMAT}: update this program"
        )
    fields = {name: checkpoint[name] for name in names[1:-1]}
    detector = create_detector(**fields, **{**checkpoint["model_kwargs"], **settings})
    try:
        detector.load_state_dict(strip_prefixes(checkpoint["state_dict"]))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"the weights do not fit {detector.arch}: {lines[1][:200]}") from None
    return detector


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
    theirs = {**checkpoint, **_all_settings(checkpoint)}
    own |= own["model_kwargs"]
    # trained with other anchors or another geometry, weights fit and find nothing
    for name in ("arch", "backbone", "attention", "legacy", "anchor_scale", "mask_pool"):
        if name == "anchor_scale" and theirs[name] is None:
            theirs[name] = 4 if own["arch"] == "retinanet" else 8  # create_detector's own choice
        if theirs.get(name) != own[name]:
            raise ValueError(f"holds {name} {theirs.get(name)}, not {own[name]}: give the same")
    weights, target = find_state_dict(checkpoint), detector.state_dict()
    fresh = set()
    if list(checkpoint.get("classes") or ()) != list(classes):
        fresh = {name for name in target if name.startswith(CLASS_LAYERS)}
    taken = {name: value for name, value in weights.items() if name not in fresh}
    for name, value in target.items():
        counter = name.endswith(".num_batches_tracked")
        if name in taken and taken[name].shape != value.shape:
            shapes = f"{list(taken[name].shape)}, not {list(value.shape)}"
            raise ValueError(f"the weights do not fit {own['arch']}: {name} is {shapes}")
        if name not in taken and name not in fresh and not counter:
            raise ValueError(f"the weights do not fit {own['arch']}: {name} is missing")
    if foreign := taken.keys() - target.keys():
        raise ValueError(f"the weights do not fit {own['arch']}: {min(foreign)} is unknown")
    detector.load_state_dict(taken, strict=False)
    said = f"{len(taken)} tensors of a trained detector kept"
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


def refuse_another_network(checkpoint: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """Raises a ValueError if `typed` is another network than the checkpoint's.

    Args:
        checkpoint: of `describe_detector`; `model_kwargs` that it lacks, as an imported one does,
            are `create_detector`'s defaults.
        typed: arch, backbone, ksize, norm, trainable_layers and legacy, as in `create_detector`;
            None, and False for legacy, where the user asks for nothing.

    Raises:
        ValueError: one line with the arguments to leave out.
    """
    its: dict[str, Any] = {name: checkpoint.get(name) for name in ("arch", "backbone", "ksize")}
    its |= _all_settings(checkpoint)
    plain = ("arch", "backbone", "norm", "trainable_layers")
    differing = [name for name in plain if typed[name] not in (None, its[name])]
    if typed["ksize"] is not None:
        attention = None if typed["backbone"] else checkpoint.get("attention")
        own = {} if attention is None else {"attention": attention}
        with torch.device("meta"):  # costs nothing, and knows what "adaptive" comes to
            network = create_model(typed["backbone"] or its["backbone"], typed["ksize"], 1, **own)
        if network.ksize != tuple(its["ksize"] or ()):
            differing.append("ksize")
    if typed["legacy"] and not its["legacy"]:
        differing.append("legacy")
    if differing:
        others = ", ".join(f"`{name}={typed[name]}`" for name in differing)
        raise ArgumentError(
            f"holds {its['arch']} on {its['backbone']}, ksize {its['ksize']}, norm "
            f"{its['norm']}: leave {others} out, or start a new run",
            **{name: typed[name] for name in differing},
        )

"""Faster R-CNN, Mask R-CNN and RetinaNet on a feature pyramid over any ResNet of this project.

The detectors are torchvision's, its parameter names included. Their
classes, anchors and P6 on C5 are those of the published COCO table. The other files of this folder
set which layers train, what BatchNorm does, and which layers compute in float32.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet

from .. import create_model
from ..construction import Ksize
from ..eca_resnet import ResNet
from ..weights import FORMAT, find_state_dict, load_weights, strip_prefixes
from .builders import build_rcnn, build_retinanet
from .heads import make_heads
from .norms import freeze

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
        norm: see `norms.set_norm`.
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
    _check_settings(arch, legacy, settings)
    num_classes = 80 + FIRST_LABEL[arch] if num_classes is None else num_classes
    network = _make_backbone(arch, backbone, ksize, num_classes, attention)
    freeze(network, trainable_layers, norm)
    anchor_scale = anchor_scale or (4 if arch == "retinanet" else 8)
    if arch == "retinanet":
        detector = build_retinanet(network, num_classes, width, anchor_scale, legacy, settings)
    else:
        heads = make_heads(arch, num_classes, width, mask_pool, legacy)
        detector = build_rcnn(
            DETECTORS[arch], network, heads, width, anchor_scale, legacy, settings
        )
    own = {"trainable_layers": trainable_layers, "norm": norm, "legacy": legacy}
    own |= {"anchor_scale": anchor_scale, "mask_pool": mask_pool, "width": width, **settings}
    _record(detector, arch, backbone, network, num_classes, own)
    return detector


def _record(
    detector: FasterRCNN | RetinaNet,
    arch: str,
    backbone: str,
    network: ResNet,
    num_classes: int,
    model_kwargs: dict[str, Any],
) -> None:
    """Writes on the detector what `describe_detector` reads: the arguments that build it again."""
    detector.arch, detector.backbone_arch, detector.num_classes = arch, backbone, num_classes
    detector.attention, detector.ksize = network.attention, network.ksize
    detector.model_kwargs = model_kwargs


def _check_settings(arch: str, legacy: bool, settings: Mapping[str, Any]) -> None:
    if arch not in DETECTORS:
        raise ValueError(f"unknown detector {arch!r}: use one of {', '.join(DETECTORS)}")
    # RetinaNet hands what it does not know to its transform, which drops it without a word.
    known = inspect.signature(DETECTORS[arch]).parameters.keys() | {"size_divisible", "fixed_size"}
    for name in settings.keys() - known:
        raise ValueError(f"{arch} has no setting {name!r}: give one such as min_size")
    if legacy and settings.get("fixed_size") is not None:
        raise ValueError("fixed_size: mmdetection v1's geometry keeps proportions; give min_size")


def _make_backbone(
    arch: str, backbone: str, ksize: Ksize, num_classes: int, attention: str | None
) -> ResNet:
    if num_classes <= FIRST_LABEL[arch]:
        raise ValueError(
            f"{arch} has no category to find with `num_classes={num_classes}`: 81 is COCO"
        )
    if ksize is None and attention in (None, "eca"):
        ksize = DETECTOR_KSIZE.get((arch, backbone))
    return _make_resnet(backbone, ksize, attention)


def _make_resnet(backbone: str, ksize: Ksize, attention: str | None) -> ResNet:
    chosen: dict[str, Any] = {} if attention is None else {"attention": attention}
    network = create_model(backbone, ksize, num_classes=1, **chosen)
    if not isinstance(network, ResNet):
        raise ValueError(f"a detector takes a ResNet such as eca_resnet50, not {backbone!r}")
    return network


def eca_faster_rcnn(
    backbone: str = "eca_resnet50", ksize: Ksize = None, num_classes: int = 81, **kwargs: Any
) -> FasterRCNN:
    """Builds a Faster R-CNN with FPN; the arguments are `create_detector`'s."""
    return create_detector("faster_rcnn", backbone, ksize, num_classes, **kwargs)


def eca_mask_rcnn(
    backbone: str = "eca_resnet50", ksize: Ksize = None, num_classes: int = 81, **kwargs: Any
) -> MaskRCNN:
    """Builds a Mask R-CNN with FPN; the arguments are `create_detector`'s."""
    return create_detector("mask_rcnn", backbone, ksize, num_classes, **kwargs)


def eca_retinanet(
    backbone: str = "eca_resnet50", ksize: Ksize = None, num_classes: int = 80, **kwargs: Any
) -> RetinaNet:
    """Builds a RetinaNet with FPN; the arguments are `create_detector`'s."""
    return create_detector("retinanet", backbone, ksize, num_classes, **kwargs)


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
    network = _make_resnet(detector.backbone_arch, detector.ksize, detector.attention)
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
    wanted = ("format", "arch", "backbone", "attention", "ksize", "num_classes", "model_kwargs")
    missing = [name for name in (*wanted, "state_dict") if name not in checkpoint]
    if missing:
        raise ValueError(
            f"not a detector's checkpoint, as it lacks {missing[0]}: give one of detect_main.py"
        )
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"checkpoint format {checkpoint['format']!r} is not {FORMAT}: update this program"
        )
    fields = {name: checkpoint[name] for name in wanted[1:-1]}
    detector = create_detector(**fields, **{**checkpoint["model_kwargs"], **settings})
    try:
        detector.load_state_dict(strip_prefixes(checkpoint["state_dict"]))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"the weights do not fit {detector.arch}: {lines[1][:200]}") from None
    return detector

"""Builds each kind of detector: a class of torchvision on one of this project's ResNets.

This file sets what makes them the networks of the published COCO table: the anchors, P6 on C5, the
first values of the heads, and the layers that keep float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..eca_resnet import ResNet
from .geometry import (
    DetectorTransform,
    LegacyBoxCoder,
    LegacyP6P7,
    LegacyTransform,
    PyramidAnchors,
)
from .heads import compute_in_float32, initialise_box_head
from .postprocessing import LegacyRetinaNet, LegacyRoIHeads, LegacyRPN


def build_retinanet(
    network: ResNet,
    num_classes: int,
    width: int,
    anchor_scale: float,
    legacy: bool,
    settings: Mapping[str, Any],
) -> RetinaNet:
    """Builds a RetinaNet on `network`; the arguments are `create_detector`'s."""
    strides = (8, 16, 32, 64, 128)
    octaves = [2 ** (i / 3) for i in range(3)]
    # torchvision cuts the sizes between the powers of two to whole pixels.
    cut = float if legacy else int
    sizes = [tuple(cut(anchor_scale * stride * octave) for octave in octaves) for stride in strides]
    detector = (LegacyRetinaNet if legacy else RetinaNet)(
        _pyramid(network, (2, 3, 4), width, legacy),
        num_classes,
        anchor_generator=PyramidAnchors(sizes, strides, legacy),
        **{"detections_per_img": 100, **settings},
    )
    compute_in_float32(detector.head.classification_head, "cls_logits")
    compute_in_float32(detector.head.regression_head, "bbox_reg")
    detector.transform = _transform(detector.transform, legacy)
    if legacy:
        detector.box_coder = LegacyBoxCoder(detector.box_coder.weights)
    return detector


def build_rcnn(
    kind: type[FasterRCNN],
    network: ResNet,
    heads: Mapping[str, nn.Module],
    width: int,
    anchor_scale: float,
    legacy: bool,
    settings: Mapping[str, Any],
) -> FasterRCNN:
    """Builds a Faster or Mask R-CNN on `network`.

    Args:
        kind: torchvision's class.
        heads: what `make_heads` returns.

    The other arguments are `create_detector`'s.
    """
    strides = (4, 8, 16, 32, 64)
    sizes = [(anchor_scale * stride,) for stride in strides]
    anchors = PyramidAnchors(sizes, strides, legacy)
    pyramid = _pyramid(network, (1, 2, 3, 4), width, legacy)
    detector = kind(pyramid, **{"rpn_anchor_generator": anchors, **settings, **heads})
    rpn, roi_heads = detector.rpn, detector.roi_heads
    initialise_box_head(roi_heads)
    compute_in_float32(rpn.head, "cls_logits", "bbox_pred")
    compute_in_float32(roi_heads.box_predictor, "cls_score", "bbox_pred")
    if kind is MaskRCNN:
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

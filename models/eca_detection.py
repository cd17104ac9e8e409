"""Faster R-CNN, Mask R-CNN and RetinaNet on a feature pyramid over any ResNet of this project.

The detectors are torchvision's, its parameter names included. What is set here makes them the
networks of the published COCO table: which layers train, what BatchNorm does, the classes, P6 on
C5. Head outputs and anchors stay float32 under autocast: at x = 1000 neighbouring bfloat16 numbers
lie 4 pixels apart.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from models import create_model
from models.building import Ksize
from models.eca_resnet import ResNet

NORMS = ("eval", "frozen", "bn", "sync")
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
FPN_CHANNELS = 256
# Where the authors' detectors differ from the kernel sizes of their ImageNet weights.
DETECTOR_KSIZE = {
    ("faster_rcnn", "eca_resnet50"): "5555",
    ("mask_rcnn", "eca_resnet50"): "3377",
    ("retinanet", "eca_resnet50"): "3377",
}
# The label of a data set's first category: the R-CNNs keep 0 for background.
FIRST_LABEL = {"faster_rcnn": 1, "mask_rcnn": 1, "retinanet": 0}


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalises by its stored statistics in training too.

    `requires_grad=False` stops only the affine part: statistics move wherever `train()` reaches.
    """

    def train(self, mode: bool = True):
        return super().train(False)


def _fix_statistics(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FixedBatchNorm2d(child.num_features, child.eps, child.momentum)
            fixed._parameters, fixed._buffers = child._parameters, child._buffers
            setattr(module, name, fixed.train())
        else:
            _fix_statistics(child)


def set_norm(body: nn.Module, norm: str, trained: Sequence[str]) -> None:
    """Makes the BatchNorms of `body` behave as `norm` says, in place; names stay as they are.

    Args:
        body: the children `STAGES`.
        norm: "eval": statistics fixed, affine trained, as the authors did; "frozen": affine fixed
            too; "bn": both move; "sync": as "bn", statistics shared over all processes.
        trained: the children of `body` that train; the others' BatchNorms are fixed whatever `norm`
            says.

    Raises:
        ValueError: for another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, such as eval, not {norm!r}")
    holder = nn.ModuleDict(body.named_children())  # so that bn1, itself a BatchNorm, has a parent
    for name in list(holder):
        part = nn.Sequential(holder[name])
        if norm in ("eval", "frozen") or name not in trained:
            _fix_statistics(part)
        elif norm == "sync":
            part = nn.SyncBatchNorm.convert_sync_batchnorm(part)
        setattr(body, name, part[0])
    if norm == "frozen":
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)


class _Float32Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class _Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def _compute_in_float32(head: nn.Module, *names: str) -> None:
    """Takes the layers `names` of `head` out of autocast; parameters and names stay."""
    for name in names:
        layer = getattr(head, name)
        if isinstance(layer, nn.Linear):
            wide = _Float32Linear(layer.in_features, layer.out_features)
        else:
            wide = _Float32Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
            )
        wide._parameters = layer._parameters
        setattr(head, name, wide)


class PyramidAnchors(AnchorGenerator):
    """float32 anchors, one set of sizes a level, on the pyramid's own strides.

    torchvision divides image by map instead, and gets 61 for 64 where 800 pixels make 13 cells.

    Args:
        sizes: for each level the anchors' sides (square root of the area) in pixels.
        strides: for each level the pixels between cells.
        legacy: mmdetection v1's anchors: centred on the middle of a cell, not on its corner, and
            rounded as (first pixel, last pixel). They are given here, as all boxes are, with the
            end one past the last pixel; in that reading its box coding, with + 1 in every width, is
            the same as torchvision's.
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], strides: Sequence[int], legacy: bool = False
    ):
        super().__init__(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = tuple(strides)
        if legacy:
            self.cell_anchors = [
                _legacy_cell(side, ratios, stride)
                for side, ratios, stride in zip(
                    self.sizes, self.aspect_ratios, strides, strict=True
                )
            ]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(s, s) for s in self.strides]))
        return [anchors] * len(image_list.image_sizes)


def _legacy_cell(sizes: Sequence[float], ratios: Sequence[float], stride: int) -> Tensor:
    """(ratios · sizes, 4): mmdetection v1's base anchors, the last pixel turned into an end."""
    root = torch.tensor(ratios).sqrt()[:, None]
    side = torch.tensor(sizes, dtype=torch.float32)[None]
    w, h = (side / root).flatten(), (side * root).flatten()
    centre = 0.5 * (stride - 1)
    first = torch.stack([centre - 0.5 * (w - 1), centre - 0.5 * (h - 1)], 1).round()
    last = torch.stack([centre + 0.5 * (w - 1), centre + 0.5 * (h - 1)], 1).round()
    return torch.cat([first, last + 1], 1)


class LegacyTransform(GeneralizedRCNNTransform):
    """mmdetection v1's resizing: sizes are rounded, and pixel indices rather than edges scale.

    A box whose last pixel is x ends at x + 1; scaled by r it ends at r·x + 1, not at r·(x + 1).
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None):
        h, w = image.shape[-2:]
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        scale = min(shorter / min(h, w), self.max_size / max(h, w))
        size = (int(h * scale + 0.5), int(w * scale + 0.5))
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = _scale_pixels(target["boxes"], (h, w), size)
            if "masks" in target:
                masks = target["masks"][:, None].float()
                target["masks"] = F.interpolate(masks, size)[:, 0].byte()
        return image, target

    def postprocess(self, result, image_shapes, original_image_sizes):
        if self.training:
            return result
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = _scale_pixels(found["boxes"], shape, original)
            if "masks" in found:
                found["masks"] = paste_masks_in_image(found["masks"], found["boxes"], original)
        return result


def _scale_pixels(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    ratio = boxes.new_tensor([new[1] / old[1], new[0] / old[0]] * 2)
    end = boxes.new_tensor([0, 0, 1, 1])
    return (boxes - end) * ratio + end


class _LegacyP6P7(LastLevelP6P7):
    """P7 straight from P6: mmdetection v1 put no ReLU between them."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]):
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


def _pyramid(
    detector: str,
    backbone: str,
    ksize: Ksize,
    attention: str | None,
    trainable_layers: int,
    norm: str,
    legacy: bool,
) -> tuple[BackboneWithFPN, ResNet]:
    """The feature pyramid over a fresh `backbone`, and the network it was taken from."""
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be 0 to 5, such as 3, not {trainable_layers}")
    options = {} if attention is None else {"attention": attention}
    if ksize is None and attention in (None, "eca"):
        ksize = DETECTOR_KSIZE.get((detector, backbone))
    network = create_model(backbone, ksize, num_classes=1, **options)
    if not isinstance(network, ResNet):
        raise ValueError(f"a detector takes a ResNet such as eca_resnet50, not {backbone!r}")
    trained = STAGES[6 - trainable_layers :] if trainable_layers < 5 else STAGES
    for name in STAGES:
        getattr(network, name).requires_grad_(name in trained)
    set_norm(network, norm, trained)
    deepest = network.fc.in_features
    levels = (2, 3, 4) if detector == "retinanet" else (1, 2, 3, 4)
    extra = LastLevelMaxPool()
    if detector == "retinanet":
        extra = (_LegacyP6P7 if legacy else LastLevelP6P7)(deepest, FPN_CHANNELS)
    pyramid = BackboneWithFPN(
        network,
        {f"layer{level}": str(i) for i, level in enumerate(levels)},
        [deepest >> (4 - level) for level in levels],
        FPN_CHANNELS,
        extra,
    )
    return pyramid, network


def _finish(detector: nn.Module, arch: str, body: ResNet, num_classes: int, legacy: bool, **kwargs):
    """Notes on the detector what a checkpoint needs to build it again."""
    if legacy:
        old = detector.transform
        detector.transform = LegacyTransform(
            old.min_size, old.max_size, old.image_mean, old.image_std, old.size_divisible
        )
    detector.arch, detector.backbone_arch = arch, body.arch
    detector.attention, detector.ksize = body.attention, body.ksize
    detector.num_classes = num_classes
    detector.model_kwargs = {**kwargs, "legacy": legacy}
    return detector


def _rcnn(
    kind: type[FasterRCNN],
    arch: str,
    backbone: str,
    ksize: Ksize,
    num_classes: int,
    attention: str | None,
    trainable_layers: int,
    norm: str,
    legacy: bool,
    settings: dict[str, Any],
) -> FasterRCNN:
    if num_classes < 2:
        raise ValueError(f"num_classes counts background: 2 or more, such as 81, not {num_classes}")
    pyramid, body = _pyramid(arch, backbone, ksize, attention, trainable_layers, norm, legacy)
    strides = (4, 8, 16, 32, 64)
    settings.setdefault(
        "rpn_anchor_generator", PyramidAnchors([[8 * s] for s in strides], strides, legacy)
    )
    detector = kind(pyramid, num_classes, **settings)
    _compute_in_float32(detector.rpn.head, "cls_logits", "bbox_pred")
    _compute_in_float32(detector.roi_heads.box_predictor, "cls_score", "bbox_pred")
    if kind is MaskRCNN:
        _compute_in_float32(detector.roi_heads.mask_predictor, "mask_fcn_logits")
    return detector

"""Faster R-CNN, Mask R-CNN and RetinaNet on a feature pyramid over any ResNet of this project.

The detectors are torchvision's, its parameter names included. What is set here makes them the
networks of the published COCO table: which layers train, what BatchNorm does, the classes, P6 on
C5. The layers whose outputs become boxes, scores and masks compute in float32 under autocast.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from models import create_model
from models.building import Ksize
from models.eca_detection_geometry import LegacyP6P7, LegacyTransform, PyramidAnchors
from models.eca_resnet import ResNet
from models.weights import FORMAT, find_state_dict, load_weights, strip_prefixes

DETECTORS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet}
# The label of a data set's first category: the R-CNNs keep 0 for background.
FIRST_LABEL = {"faster_rcnn": 1, "mask_rcnn": 1, "retinanet": 0}
# The keys of the dict that a detector returns in training.
LOSSES = {
    "faster_rcnn": ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"),
    "mask_rcnn": (
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
    ),
    "retinanet": ("classification", "bbox_regression"),
}  # fmt: skip
# Where the authors' detectors leave the kernel sizes of their ImageNet weights.
DETECTOR_KSIZE = {
    ("faster_rcnn", "eca_resnet50"): "5555",
    ("mask_rcnn", "eca_resnet50"): "3377",
    ("retinanet", "eca_resnet50"): "3377",
}
NORMS = ("eval", "frozen", "bn", "sync")
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalises by its stored statistics in training too.

    `requires_grad=False` stops only the affine part: statistics move wherever `train()` reaches.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.train()

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        return super().train(False)


def set_norm(body: nn.Module, norm: str, trained: Sequence[str]) -> None:
    """Makes the BatchNorms of `body` behave as `norm` says, in place; all names stay.

    Args:
        body: a network with the children `STAGES`.
        norm: "eval": statistics fixed, affine trained, as the authors did; "frozen": affine fixed
            too; "bn": both move; "sync": as "bn", with statistics over all processes.
        trained: the stages that train; the others' statistics are fixed whatever `norm` says.

    Raises:
        ValueError: for another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, such as eval, not {norm!r}")
    for name in STAGES:
        stage = nn.Sequential(getattr(body, name))  # a parent, as bn1 is itself a BatchNorm
        if norm in ("eval", "frozen") or name not in trained:
            _fix_statistics(stage)
        elif norm == "sync":
            stage = nn.SyncBatchNorm.convert_sync_batchnorm(stage)
        if norm == "frozen":
            for module in stage.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        setattr(body, name, stage[0])


def _fix_statistics(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FixedBatchNorm2d(child.num_features, child.eps, child.momentum)
            fixed._parameters, fixed._buffers = child._parameters, child._buffers
            setattr(module, name, fixed)
        else:
            _fix_statistics(child)


class _Float32Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        with _without_autocast(x):
            return super().forward(x.float())


class _Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with _without_autocast(x):
            return super().forward(x.float())


def _without_autocast(x: Tensor) -> AbstractContextManager:
    kind = x.device.type  # meta has no autocast to leave
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


def _compute_in_float32(head: nn.Module, *names: str) -> None:
    """Takes the layers `names` of `head` out of autocast; parameters and names stay."""
    for name in names:
        old = getattr(head, name)
        if isinstance(old, nn.Linear):
            new = _Float32Linear(old.in_features, old.out_features)
        else:
            new = _Float32Conv2d(
                old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding
            )
        new._parameters = old._parameters
        setattr(head, name, new)


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
        num_classes: outputs for each box: with background for the R-CNNs (81 for COCO), without
            for RetinaNet (80), as in FIRST_LABEL + the number of categories.
        attention: another attention in the backbone's blocks; None for the backbone's own.
        trainable_layers: 3 trains layer2 to layer4, 4 layer1 too, 5 all, 0 nothing of the backbone.
        norm: see `set_norm`.
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
        ValueError: one line, for a value that will not do.
    """
    if arch not in DETECTORS:
        raise ValueError(f"unknown detector {arch!r}: use one of {', '.join(DETECTORS)}")
    # RetinaNet hands what it does not know to its transform, which drops it without a word.
    known = inspect.signature(DETECTORS[arch]).parameters.keys() | {"size_divisible", "fixed_size"}
    for name in settings.keys() - known:
        raise ValueError(f"{arch} has no setting {name!r}: give one such as min_size")
    if num_classes is None:
        num_classes = 80 + FIRST_LABEL[arch]
    if num_classes <= FIRST_LABEL[arch]:
        raise ValueError(
            f"{arch} has no category to find with num_classes={num_classes}: 81 is COCO"
        )
    if ksize is None and attention in (None, "eca"):
        ksize = DETECTOR_KSIZE.get((arch, backbone))
    chosen = {} if attention is None else {"attention": attention}
    network = create_model(backbone, ksize, num_classes=1, **chosen)
    if not isinstance(network, ResNet):
        raise ValueError(f"a detector takes a ResNet such as eca_resnet50, not {backbone!r}")
    _freeze(network, trainable_layers, norm)

    single_stage = arch == "retinanet"
    strides = (8, 16, 32, 64, 128) if single_stage else (4, 8, 16, 32, 64)
    anchor_scale = anchor_scale or (4 if single_stage else 8)
    anchors = PyramidAnchors(
        _anchor_sizes(single_stage, anchor_scale, strides, legacy), strides, legacy
    )
    pyramid = _pyramid(network, (2, 3, 4) if single_stage else (1, 2, 3, 4), width, legacy)
    if single_stage:
        given = {"detections_per_img": 100, **settings}
        detector = RetinaNet(pyramid, num_classes, anchor_generator=anchors, **given)
        _compute_in_float32(detector.head.classification_head, "cls_logits")
        _compute_in_float32(detector.head.regression_head, "bbox_reg")
    else:
        given = {"rpn_anchor_generator": anchors, **settings}
        given |= _heads(arch, num_classes, width, mask_pool)
        detector = DETECTORS[arch](pyramid, **given)
        _initialise_box_head(detector.roi_heads)
        _compute_in_float32(detector.rpn.head, "cls_logits", "bbox_pred")
        _compute_in_float32(detector.roi_heads.box_predictor, "cls_score", "bbox_pred")
    if arch == "mask_rcnn":
        nn.init.normal_(detector.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.01)
        _compute_in_float32(detector.roi_heads.mask_predictor, "mask_fcn_logits")
    if legacy:
        new = detector.transform
        detector.transform = LegacyTransform(
            new.min_size, new.max_size, new.image_mean, new.image_std, new.size_divisible
        )
    detector.arch, detector.backbone_arch, detector.num_classes = arch, backbone, num_classes
    detector.attention, detector.ksize = network.attention, network.ksize
    detector.model_kwargs = {
        "trainable_layers": trainable_layers,
        "norm": norm,
        "legacy": legacy,
        "anchor_scale": anchor_scale,
        "mask_pool": mask_pool,
        "width": width,
        **settings,
    }
    return detector


def _freeze(network: ResNet, trainable_layers: int, norm: str) -> None:
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be 0 to 5, such as 3, not {trainable_layers}")
    trained = STAGES if trainable_layers == 5 else STAGES[6 - trainable_layers :]
    for name in STAGES:
        getattr(network, name).requires_grad_(name in trained)
    set_norm(network, norm, trained)


def _initialise_box_head(heads: RoIHeads) -> None:
    """As mmdetection does. torch's own initialisation shrinks the signal threefold in two layers,
    which costs a network without pretrained weights its first hundred steps."""
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer, std in (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 1e-3),
    ):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def _anchor_sizes(
    single_stage: bool, scale: float, strides: Sequence[int], legacy: bool
) -> list[tuple[float, ...]]:
    if not single_stage:
        return [(scale * stride,) for stride in strides]
    octaves = [2 ** (i / 3) for i in range(3)]
    # torchvision cuts the sizes between the powers of two to whole pixels.
    cut = float if legacy else int
    return [tuple(cut(scale * stride * octave) for octave in octaves) for stride in strides]


def _heads(arch: str, num_classes: int, width: int, mask_pool: int) -> dict[str, nn.Module]:
    """The R-CNNs' heads as torchvision makes them, but of any width."""
    heads = {
        "box_head": TwoMLPHead(width * 7**2, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, num_classes),
    }
    if arch == "mask_rcnn":
        heads["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], mask_pool, 2)
        heads["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
        heads["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes)
    return heads


def _pyramid(
    network: ResNet, levels: Sequence[int], width: int, legacy: bool
) -> BackboneWithFPN:
    deepest = network.fc.in_features
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


def eca_faster_rcnn(
    backbone: str = "eca_resnet50", ksize: Ksize = None, num_classes: int = 81, **kwargs: Any
) -> FasterRCNN:
    """Faster R-CNN with FPN; the arguments are `create_detector`'s."""
    return create_detector("faster_rcnn", backbone, ksize, num_classes, **kwargs)


def eca_mask_rcnn(
    backbone: str = "eca_resnet50", ksize: Ksize = None, num_classes: int = 81, **kwargs: Any
) -> MaskRCNN:
    """Mask R-CNN with FPN; the arguments are `create_detector`'s."""
    return create_detector("mask_rcnn", backbone, ksize, num_classes, **kwargs)


def eca_retinanet(
    backbone: str = "eca_resnet50", ksize: Ksize = None, num_classes: int = 80, **kwargs: Any
) -> RetinaNet:
    """RetinaNet with FPN; the arguments are `create_detector`'s."""
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
    network = create_model(
        detector.backbone_arch, detector.ksize, num_classes=1, attention=detector.attention
    )
    head = {name: value for name, value in network.state_dict().items() if name.startswith("fc.")}
    load_weights(network, {**find_state_dict(checkpoint), **head})
    loaded, body = network.state_dict(), detector.backbone.body
    body.load_state_dict({name: loaded[name] for name in body.state_dict()})
    return f"Loaded {len(body.state_dict())} tensors into the backbone; its fc is not used."


def describe_detector(detector: FasterRCNN | RetinaNet) -> dict[str, Any]:
    """The fields of a checkpoint from which `detector_from_checkpoint` builds the network again."""
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
    """Builds the detector that a checkpoint of ours holds, with its weights.

    Args:
        checkpoint: the fields of `describe_detector`, "format" and "state_dict".
        **settings: replace the checkpoint's `model_kwargs`, such as `min_size`.

    Raises:
        ValueError: one line, when it is no such checkpoint or its weights do not fit.
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

"""The R-CNNs' heads, of any width, and output layers that keep float32 under autocast.

Boxes decoded from bfloat16 are wrong by pixels. So the layers whose outputs become boxes, scores or
masks compute in float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from .geometry import LegacyRoIAlign


def make_heads(
    arch: str, num_classes: int, width: int, mask_pool: int, legacy: bool
) -> dict[str, nn.Module]:
    """Makes the R-CNNs' heads as torchvision does, but of any width.

    Returns:
        Arguments for torchvision's class: the heads that replace its own. With `legacy` RoIAlign is
        that of mmdetection v1.
    """
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


def initialise_box_head(heads: RoIHeads) -> None:
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


def compute_in_float32(head: nn.Module, *names: str) -> None:
    """Makes the layers `names` of `head` ignore autocast; their parameters and names stay."""
    for name in names:
        old = getattr(head, name)
        if isinstance(old, nn.Linear):
            new: nn.Module = _Float32Linear(old.in_features, old.out_features)
        else:
            new = _Float32Conv2d(
                old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding
            )
        new._parameters = old._parameters
        setattr(head, name, new)

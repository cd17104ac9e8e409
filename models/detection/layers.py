"""What this project changes in torchvision's detectors: anchors, resizing, precision, BatchNorm.

Boxes are (x1, y1, x2, y2) everywhere; x2 and y2 are one past the last pixel.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx import operators
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

RATIOS = (0.5, 1.0, 2.0)  # height over width
NORMS = ("eval", "frozen", "bn", "sync")
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


class PyramidAnchors(AnchorGenerator):
    """Makes float32 anchors at the pyramid's own strides, with sizes for each level.

    torchvision divides the image's size by the feature map's size. Where 800 pixels make 13 cells,
    that gives a stride of 61 in place of 64. Its anchors also have the dtype of the feature maps:
    under bfloat16 autocast x = 1000 is rounded to a multiple of 4.

    Args:
        sizes: for each level the anchors' sides (the square root of the area) in pixels.
        strides: for each level the pixels between cells.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]):
        super().__init__(tuple(map(tuple, sizes)), (RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(s, s) for s in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class DetectorTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation and resizing, with sides of at least one pixel.

    torchvision rounds the shorter side down: an image of 2000 × 1 pixels becomes 1333 × 0, which is
    an error there. Images of usual proportions get torchvision's sizes and values.
    """

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.fixed_size is not None:
            return super().resize(image, target)
        if torchvision._is_tracing():
            return self._traced_resize(image), target
        return self._resize(image, target)

    def _traced_resize(self, image: Tensor) -> Tensor:
        """Resizes by operations on tensors, so that a graph computes the size from its input's.

        torchvision writes the factor in float32, as max_size · (1 / side): times the side that is
        159.99999 for some sizes, which rounds down to 159.
        """
        original = operators.shape_as_tensor(image)[-2:].to(torch.float64)
        # Vectors, as the exporter to ONNX writes numbers of float64 as float32.
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (limits / torch.stack([original.min(), original.max()])).amin(0, keepdim=True)
        height, width = (original * scale).to(torch.int64).clamp(min=1)
        size = (height, width)
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

    def _resize(
        self, image: Tensor, target: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        original = image.shape[-2:]
        shorter = self.min_size[-1]
        if self.training:  # a target may say which of the sizes was drawn for its image
            drawn = None if target is None else target.pop("min_size", None)
            shorter = self.torch_choice(self.min_size) if drawn is None else drawn
        scale = self._factor(original, shorter)
        size = tuple(max(1, self._round(side * scale)) for side in original)
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = self._resize_boxes(target["boxes"], original, size, scale)
            if "masks" in target:
                masks = target["masks"][:, None].float()
                target["masks"] = F.interpolate(masks, size)[:, 0].byte()
        return image, target

    def _factor(self, size: Sequence[int], shorter: float) -> float:
        return min(shorter / min(size), self.max_size / max(size))

    def _round(self, side: float) -> int:
        return int(side)

    def _resize_boxes(
        self, boxes: Tensor, original: Sequence[int], size: Sequence[int], scale: float
    ) -> Tensor:
        return resize_boxes(boxes, original, size)


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
    """Makes the layers `names` of `head` ignore autocast; their parameters and names stay.

    Boxes decoded from bfloat16 are wrong by pixels, so the layers whose outputs become boxes,
    scores or masks compute in float32.
    """
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


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that uses its stored statistics in training too.

    `requires_grad=False` fixes weight and bias alone: after `train()` the statistics would change.
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
        norm: "eval": statistics fixed, weight and bias trained, as the authors did; "frozen": all
            fixed; "bn": all change; "sync": as "bn", with statistics over all processes.
        trained: the stages that train; the statistics of the others are fixed for any `norm`.

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


def freeze(network: nn.Module, trainable_layers: int, norm: str) -> None:
    """Leaves the last `trainable_layers` of the network trainable, with BatchNorm as `norm` says.

    Args:
        network: a ResNet of this project; see `set_norm`.
        trainable_layers: 3 trains layer2 to layer4, 4 layer1 too, 5 all, 0 nothing.

    Raises:
        ValueError: for another number or `norm`.
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be 0 to 5, such as 3, not {trainable_layers}")
    trained = STAGES if trainable_layers == 5 else STAGES[6 - trainable_layers :]
    for name in STAGES:
        getattr(network, name).requires_grad_(name in trained)
    set_norm(network, norm, trained)

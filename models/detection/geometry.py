"""The detectors' anchors and resizing: this project's, and those of mmdetection v1 ("legacy").

Boxes are (x1, y1, x2, y2) everywhere; x2 and y2 are one past the last pixel. mmdetection v1 kept
the last pixel itself and added 1 to every width. When its boxes are written as ours, its IoU is
torchvision's formula. Its box coding is too, except for boxes that shrink very much, and so is its
RoIAlign, except for very small regions. This file holds what remains different.
"""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.onnx import operators
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

RATIOS = (0.5, 1.0, 2.0)  # height over width


class PyramidAnchors(AnchorGenerator):
    """Makes float32 anchors at the pyramid's own strides, with sizes for each level.

    torchvision divides the image's size by the feature map's size. Where 800 pixels make 13 cells,
    that gives a stride of 61 in place of 64. Its anchors also have the dtype of the feature maps:
    under bfloat16 autocast x = 1000 is rounded to a multiple of 4.

    Args:
        sizes: for each level the anchors' sides (the square root of the area) in pixels.
        strides: for each level the pixels between cells.
        legacy: centred on the middle of a cell, not on its corner, and rounded as (first pixel,
            last pixel).
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], strides: Sequence[int], legacy: bool = False
    ):
        super().__init__(tuple(map(tuple, sizes)), (RATIOS,) * len(sizes))
        self.strides = tuple(strides)
        if legacy:
            self.cell_anchors = list(map(_legacy_cell, self.sizes, self.strides))

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(s, s) for s in self.strides]))
        return [anchors] * len(image_list.image_sizes)


def _legacy_cell(sizes: Sequence[float], stride: int) -> Tensor:
    """Computes the anchors of the first cell: (3 · len(sizes), 4)."""
    root = torch.tensor(RATIOS, device="cpu").sqrt()[:, None]
    side = torch.tensor(sizes, dtype=torch.float32, device="cpu")[None]
    size = torch.stack([(side / root).flatten(), (side * root).flatten()], 1)
    centre = 0.5 * (stride - 1)
    first = (centre - 0.5 * (size - 1)).round()
    last = (centre + 0.5 * (size - 1)).round()
    return torch.cat([first, last + 1], 1)


class ScaledSize(tuple):
    """The (height, width) of a resized image, with the factor of the resizing as `scale`.

    Height and width are whole pixels, so the factor cannot be read off them.
    """

    scale: float

    def __new__(cls, size: Sequence[int], scale: float) -> "ScaledSize":
        made = super().__new__(cls, size)
        made.scale = scale
        return made


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
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
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


class LegacyTransform(DetectorTransform):
    """mmdetection v1's resizing: one factor for both directions, and pixel indices that scale.

    The factor is min(max_size / longer side, min_size / shorter side), and only the size of the
    image is rounded (mmcv's imrescale). A box whose last pixel is x ends at x + 1; scaled by r it
    ends at r·x + 1, not at r·(x + 1).
    """

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        originals = [tuple(image.shape[-2:]) for image in images]
        batch, targets = super().forward(images, targets)
        if not self.training:  # in training the factor is drawn, and nothing is scaled back
            batch.image_sizes = [
                ScaledSize(size, self._factor(original, self.min_size[-1]))
                for size, original in zip(batch.image_sizes, originals, strict=True)
            ]
        return batch, targets

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self._resize(image, target)  # traced too: torchvision's graph rounds sides down

    def _round(self, side: float) -> int:
        return int(side + 0.5)

    def _resize_boxes(
        self, boxes: Tensor, original: Sequence[int], size: Sequence[int], scale: float
    ) -> Tensor:
        return clip_pixels(scale_pixels(boxes, scale), size)

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[ScaledSize],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        if self.training:
            return result
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = scale_pixels(found["boxes"], 1 / shape.scale)
            if "masks" in found:
                found["masks"] = paste_masks_in_image(found["masks"], found["boxes"], original)
        return result


def scale_pixels(boxes: Tensor, scale: float) -> Tensor:
    """Multiplies the first and the last pixel of (..., 4) boxes by `scale`."""
    end = boxes.new_tensor([0, 0, 1, 1])
    return (boxes - end) * scale + end


def clip_pixels(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Moves the first and the last pixel of (..., 4) boxes into an image of (height, width) `size`.

    mmdetection v1's rule (delta2bbox): both lie in [0, width - 1], so that a box outside the image
    becomes one that is 1 pixel wide at its edge.
    """
    end = boxes.new_tensor([0, 0, 1, 1])
    last = boxes.new_tensor([size[1] - 1, size[0] - 1] * 2)
    return (boxes - end).clamp(min=0).minimum(last) + end


class LegacyBoxCoder(BoxCoder):
    """mmdetection v1's box coding: a side grows or shrinks by a factor of at most 62.5.

    torchvision limits growth alone.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        codes = rel_codes.clone()
        for i in (2, 3):
            codes[:, i::4].clamp_(min=-self.bbox_xform_clip * self.weights[i])
        return super().decode_single(codes, boxes)


class LegacyRoIAlign(MultiScaleRoIAlign):
    """mmdetection v1's RoIAlign on P2 to P5: a region smaller than a cell keeps its size.

    torchvision's RoIAlign enlarges such a region to one cell. With `aligned=True` it does not, but
    it moves every region by half a cell; this class moves them back.
    """

    def __init__(self, output_size: int):
        super().__init__(["0", "1", "2", "3"], output_size, sampling_ratio=2)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        regions = torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
        levels = LevelMapper(2, 5)(boxes)
        pooled = x["0"].new_zeros(len(regions), x["0"].shape[1], *self.output_size)
        for level, name in enumerate(self.featmap_names):
            cell = 4 << level
            chosen = torch.where(levels == level)[0]
            moved = regions[chosen]
            moved[:, 1:] += cell / 2
            found = roi_align(
                x[name], moved, self.output_size, 1 / cell, self.sampling_ratio, aligned=True
            )
            pooled[chosen] = found.to(pooled.dtype)  # autocast may give the levels several
        return pooled


class LegacyP6P7(LastLevelP6P7):
    """P6 and P7 as mmdetection v1 made them: no ReLU before P7."""

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]

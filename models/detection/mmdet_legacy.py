"""mmdetection v1's geometry and choice of detections ("legacy"), for weights trained with it.

mmdetection v1 kept the last pixel of a box itself and added 1 to every width. When its boxes are
written as ours, its IoU is torchvision's formula. Its box coding is too, except for boxes that
shrink very much, and so is its RoIAlign, except for very small regions. This file holds what
remains different: anchors, resizing, clipping, P7, and the last non-maximum suppression (NMS). That
one takes boxes in pixels of the original image, as mmdetection's widths, last - first + 1, depend
on the scale. The boxes that are returned are in pixels of the resized image, as torchvision's are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, batched_nms, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from .layers import RATIOS, DetectorTransform, PyramidAnchors


class LegacyAnchors(PyramidAnchors):
    """Anchors centred on the middle of a cell, and rounded as (first pixel, last pixel)."""

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]):
        super().__init__(sizes, strides)
        self.cell_anchors = list(map(_legacy_cell, self.sizes, self.strides))


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
        for each, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            each["boxes"] = scale_pixels(each["boxes"], 1 / shape.scale)
            if "masks" in each:
                each["masks"] = paste_masks_in_image(each["masks"], each["boxes"], original)
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
            values = roi_align(
                x[name], moved, self.output_size, 1 / cell, self.sampling_ratio, aligned=True
            )
            pooled[chosen] = values.to(pooled.dtype)  # autocast may give the levels several
        return pooled


class LegacyP6P7(LastLevelP6P7):
    """P6 and P7 as mmdetection v1 made them: no ReLU before P7."""

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class LegacyRPN(RegionProposalNetwork):
    """torchvision's region proposal network with mmdetection v1's clipping."""

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        clipped = torch.stack(list(map(clip_pixels, proposals, image_shapes)))
        # torchvision's own clipping then finds nothing left to clip
        return super().filter_proposals(clipped, objectness, image_shapes, num_anchors_per_level)


class LegacyRoIHeads(RoIHeads):
    """torchvision's heads of the R-CNNs with mmdetection v1's choice of detections."""

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[ScaledSize],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        counts = [len(regions) for regions in proposals]
        all_boxes = self.box_coder.decode(box_regression, proposals).split(counts)
        all_scores = class_logits.softmax(-1).split(counts)
        chosen = [
            choose_detections(
                clip_pixels(boxes, size)[:, 1:],
                scores[:, 1:],
                size.scale,
                self.score_thresh,
                self.nms_thresh,
                self.detections_per_img,
            )
            for boxes, scores, size in zip(all_boxes, all_scores, image_shapes, strict=True)
        ]
        boxes, scores, labels = map(list, zip(*chosen, strict=True))
        return boxes, scores, [label + 1 for label in labels]


class LegacyRetinaNet(RetinaNet):
    """torchvision's RetinaNet with mmdetection v1's choice of detections.

    `topk_candidates` counts the anchors of a level, ordered by their best class, and each of them
    takes part with all its classes (`AnchorHead.get_bboxes_single`). torchvision counts pairs of an
    anchor and a class.
    """

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[ScaledSize],
    ) -> list[dict[str, Tensor]]:
        detections = []
        for i, size in enumerate(image_shapes):
            boxes_of_levels, scores_of_levels = [], []
            for logits, codes, cells in zip(
                head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors[i], strict=True
            ):
                level = logits[i].sigmoid()
                best = level.amax(1)
                top = best.topk(min(self.topk_candidates, len(best))).indices
                boxes_of_levels.append(self.box_coder.decode_single(codes[i][top], cells[top]))
                scores_of_levels.append(level[top])
            scores = torch.cat(scores_of_levels)
            boxes = clip_pixels(torch.cat(boxes_of_levels), size)
            boxes = boxes[:, None].expand(-1, scores.shape[1], 4)
            chosen = choose_detections(
                boxes,
                scores,
                size.scale,
                self.score_thresh,
                self.nms_thresh,
                self.detections_per_img,
            )
            detections.append(dict(zip(("boxes", "scores", "labels"), chosen, strict=True)))
        return detections


def choose_detections(
    boxes: Tensor, scores: Tensor, scale: float, lowest: float, overlap: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the detections of an image: NMS within each class, in pixels of the original image.

    Args:
        boxes: (N, classes, 4), clipped, in pixels of the resized image.
        scores: (N, classes).
        scale: the factor that the image was resized by.
        lowest: detections score more than this.
        overlap: if two boxes of one class have a higher IoU than this, the better one stays.
        limit: the largest number of detections.

    Returns:
        boxes (n, 4) in pixels of the resized image, scores (n) and columns of `scores` (n), best
        first.
    """
    rows, labels = torch.where(scores > lowest)
    boxes, scores = boxes[rows, labels], scores[rows, labels]
    best = batched_nms(scale_pixels(boxes, 1 / scale), scores, labels, overlap)[:limit]
    return boxes[best], scores[best], labels[best]

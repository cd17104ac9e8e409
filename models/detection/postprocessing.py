"""Chooses detections from a network's outputs as mmdetection v1 did ("legacy").

Boxes are clipped by pixel indices. The last non-maximum suppression (NMS) takes boxes in pixels of
the original image, as mmdetection's widths, last - first + 1, depend on the scale. The boxes that
are returned are in pixels of the resized image, as torchvision's are.
"""

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import batched_nms

from .geometry import ScaledSize, clip_pixels, scale_pixels


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
        found = [
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
        boxes, scores, labels = map(list, zip(*found, strict=True))
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
    kept = batched_nms(scale_pixels(boxes, 1 / scale), scores, labels, overlap)[:limit]
    return boxes[kept], scores[kept], labels[kept]

"""Detections drawn on images: boxes, masks, class and score, beside the ground truth."""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4", "#f032e6", "#bfef45")
BORDER = 2  # pixels between pictures


def draw(
    image: Tensor, found: dict[str, Tensor], names: Sequence[str], least_score: float = 0.0
) -> Tensor:
    """The picture with boxes, masks and captions on it.

    Args:
        image: (3, H, W) uint8.
        found: boxes (n, 4), labels (n,) indices into `names`, and where known scores (n,) and masks
            (n, H, W) or (n, 1, H, W), 0 to 1.
        least_score: detections under it are not drawn.

    Returns:
        (3, H, W) uint8.
    """
    found = {k: v.detach().cpu() for k, v in found.items()}
    if "scores" in found:
        kept = found["scores"] >= least_score
        found = {k: v[kept] for k, v in found.items()}
    if not len(found["boxes"]):
        return image
    labels = found["labels"].tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    captions = [names[label] for label in labels]
    if "scores" in found:
        scores = found["scores"].tolist()
        captions = [f"{c}: {s:.2f}" for c, s in zip(captions, scores, strict=True)]
    if "masks" in found:
        masks = found["masks"].reshape(len(labels), *image.shape[1:]) > 0.5
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colours)
    return draw_bounding_boxes(
        image,
        found["boxes"],
        captions,
        colours,
        width=1,
        label_colors="black",
        label_background_colors=colours,
        fill_labels=True,
    )


def enlarge(image: Tensor, found: dict[str, Tensor], factor: int) -> tuple[Tensor, dict]:
    """Image and targets or detections, `factor` times as large, so that captions can be read."""
    if factor == 1:
        return image, found
    size = [factor * n for n in image.shape[1:]]
    image = F.interpolate(image[None], size, mode="nearest")[0]
    found = {**found, "boxes": found["boxes"] * factor}
    if "masks" in found:
        masks = found["masks"].reshape(len(found["boxes"]), 1, *found["masks"].shape[-2:])
        found["masks"] = F.interpolate(masks.float(), size, mode="nearest")[:, 0]
    return image, found


def side_by_side(
    images: Sequence[Tensor],
    truths: Sequence[dict[str, Tensor]],
    detections: Sequence[dict[str, Tensor]],
    names: Sequence[str],
    columns: int = 2,
    least_score: float = 0.5,
    side: int = 320,
) -> Tensor:
    """Pairs of pictures, ground truth left and detections right, in one.

    Args:
        images: (3, H, W) uint8 each.
        truths, detections: as `draw` takes them.
        columns: pairs in a row.
        side: pixels that an image's longer side gets at least.
    """
    pictures = []
    for image, truth, found in zip(images, truths, detections, strict=True):
        factor = -(-side // max(image.shape[1:]))
        pictures.append(draw(*enlarge(image, truth, factor), names))
        pictures.append(draw(*enlarge(image, found, factor), names, least_score))
    height = max(picture.shape[1] for picture in pictures)
    width = max(picture.shape[2] for picture in pictures)
    padded = [
        F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1]), value=255) for p in pictures
    ]
    return make_grid(padded, nrow=2 * columns, padding=BORDER, pad_value=255)


def png(picture: Tensor) -> bytes:
    """The (3, H, W) uint8 picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()

"""Draws detections on images: boxes, masks, class and score, beside the ground truth."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from utils.detection.label_places import place_labels
from utils.system.text import printable

# Of Okabe and Ito, for people with any form of colour blindness, each with black text on it.
COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#2fbf8f", "#ff7f50", "#e69ac4", "#b3b3ff", "#c8e06c")
BORDER = 4  # pixels between pictures
TITLE = 24  # pixels of the line above the pictures
TEXT = 12  # pixels of a label's letters
SHARE = 0.45  # of a mask's colour in its pixels


def draw(
    image: Tensor, found: dict[str, Tensor], names: Sequence[str], least_score: float = 0.0
) -> Tensor:
    """Draws boxes, masks and labels on a picture.

    No label covers another one. A label that finds no room at its box is moved, and a line leads
    from it to the box. Where masks overlap, the one with the higher score is shown.

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
        order = found["scores"].argsort(descending=True, stable=True)
        kept = order[found["scores"][order] >= least_score]
        found = {k: v[kept] for k, v in found.items()}
    if not len(found["boxes"]):
        return image
    labels = found["labels"].tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    captions = [printable(names[label]) for label in labels]
    if "scores" in found:
        captions = [f"{c} {s:.2f}" for c, s in zip(captions, found["scores"].tolist(), strict=True)]
    if "masks" in found:
        masks = found["masks"].reshape(len(labels), *image.shape[1:]) > 0.5
        image = _with_masks(image, masks, colours)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    _draw_boxes(picture, found["boxes"].tolist(), captions, colours)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _with_masks(image: Tensor, masks: Tensor, colours: Sequence[str]) -> Tensor:
    """Tints each pixel with the first mask that has it, and outlines every mask."""
    tinted = image.clone()
    for mask, colour in reversed(list(zip(masks, colours, strict=True))):
        rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)])[:, None]
        before = image[:, mask].float()
        tinted[:, mask] = (before + SHARE * (rgb - before)).round().to(torch.uint8)
        inner = -F.max_pool2d(-mask[None].float(), 3, 1, 1)[0] > 0
        tinted[:, mask & ~inner] = rgb.to(torch.uint8)
    return tinted


def _draw_boxes(
    picture: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colours: Sequence[str],
) -> None:
    pen, font = ImageDraw.Draw(picture), _font(TEXT)
    for box, colour in zip(boxes, colours, strict=True):
        pen.rectangle([round(value) for value in box], outline=colour, width=1)
    captions = [_fit(pen, caption, font, picture.width - 4) for caption in captions]
    sizes = [(round(pen.textlength(text, font)) + 4, TEXT + 4) for text in captions]
    places = place_labels(boxes, sizes, picture.size)
    for (x, y, lead), size, colour in zip(places, sizes, colours, strict=True):
        if lead is not None:
            pen.line((x + size[0] // 2, y + size[1] // 2, *lead), fill=colour, width=1)
    for (x, y, _), size, text, colour in zip(places, sizes, captions, colours, strict=True):
        pen.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), fill=colour)
        pen.text((x + 2, y + size[1] / 2), text, "black", font, anchor="lm")


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # for its font, which has more alphabets than Pillow's

    return ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cuts the end of a text that is wider than `width` pixels."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def enlarge(image: Tensor, found: dict[str, Tensor], factor: int) -> tuple[Tensor, dict]:
    """Returns image and targets or detections `factor` times as large, to have room for labels."""
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
    """Draws pairs of pictures, ground truth left and detections right, in one.

    Args:
        images: (3, H, W) uint8 each.
        truths, detections: as `draw` takes them.
        columns: pairs in a row.
        side: pixels that an image's longer side gets at least.

    Returns:
        (3, H, W) uint8, with a line of titles above.
    """
    pairs = []
    for image, truth, found in zip(images, truths, detections, strict=True):
        factor = -(-side // max(image.shape[1:]))
        left = draw(*enlarge(image, truth, factor), names)
        pairs.append((left, draw(*enlarge(image, found, factor), names, least_score)))
    height = max((left.shape[1] for left, _ in pairs), default=side)
    width = max((left.shape[2] for left, _ in pairs), default=side)
    across = min(columns, max(1, len(pairs)))
    down = -(-len(pairs) // across)
    step_x, step_y = width + BORDER, height + BORDER
    page = Image.new("RGB", (BORDER + 2 * across * step_x, TITLE + BORDER + down * step_y), "white")
    pen, font = ImageDraw.Draw(page), _font(TEXT + 1)
    for i in range(2 * across):
        title = f"Detections, score ≥ {least_score:g}" if i % 2 else "Ground truth"
        text = _fit(pen, title, font, width)
        pen.text((BORDER + i * step_x + width / 2, TITLE / 2 + 2), text, "black", font, anchor="mm")
    for i, pair in enumerate(pairs):
        for j, picture in enumerate(pair):
            x = BORDER + (2 * (i % across) + j) * step_x
            page.paste(
                Image.fromarray(picture.permute(1, 2, 0).numpy()),
                (x, TITLE + BORDER + i // across * step_y),
            )
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def png(picture: Tensor) -> bytes:
    """Returns the (3, H, W) uint8 picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()

"""Draws detections on images: boxes, masks, class and score, beside the ground truth."""

import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from utils.data import coco_masks
from utils.data.coco import CocoPaths
from utils.data.coco_dataset import CocoDataset, load_split
from utils.data.coco_eval import Result
from utils.data.decoding import BrokenImageError
from utils.system.files import write_atomically
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
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks  # slow to import

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
        masks &= masks.cumsum(0) == 1  # torchvision blackens what two masks have
        image = draw_segmentation_masks(image, masks, SHARE, colours)
    image = draw_bounding_boxes(image, found["boxes"].round(), colors=colours)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    _draw_labels(picture, found["boxes"].tolist(), captions, colours)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _draw_labels(
    picture: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colours: Sequence[str],
) -> None:
    pen, font = ImageDraw.Draw(picture), _font(TEXT)
    captions = [_fit(pen, caption, font, picture.width - 4) for caption in captions]
    sizes = [(round(pen.textlength(text, font)) + 4, TEXT + 4) for text in captions]
    places = place_labels(boxes, sizes, picture.size)
    for (x, y, lead), size, colour in zip(places, sizes, colours, strict=True):
        if lead is not None:
            pen.line((x + size[0] // 2, y + size[1] // 2, *lead), fill=colour, width=1)
    # The surest stand first, and are drawn last: where there is no room, they cover the others.
    drawn = list(zip(places, sizes, captions, colours, strict=True))
    for (x, y, _), size, text, colour in reversed(drawn):
        pen.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), fill=colour)
        pen.text((x + 2, y + size[1] / 2), text, "black", font, anchor="lm")


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> list[tuple[int, int, tuple[int, int] | None]]:
    """Returns where each label stands, the first ones first, so that none covers another one.

    A label stands above its box, below it, or within it. Where all of these are taken, it stands at
    the nearest free position. Where the whole picture is taken, it stays at its box.

    Args:
        boxes: x1, y1, x2, y2 in pixels.
        sizes: width and height of each label, not larger than the canvas.
        canvas: width and height of the picture.

    Returns:
        For each label its left and top, and where it was moved away from its box the point of the
        box that a line should lead to.
    """
    taken: list[tuple[int, int, int, int]] = []
    places: list[tuple[int, int, tuple[int, int] | None]] = []
    for box, (width, height) in zip(boxes, sizes, strict=True):
        x1, y1, x2, y2 = (round(value) for value in box)
        right, bottom = canvas[0] - width, canvas[1] - height
        corners = product((y1 - height, y2, y1, y2 - height), (x1, x2 - width))
        at_box = [(max(0, min(x, right)), max(0, min(y, bottom))) for y, x in corners]
        grid = product(range(0, right + 1, 8), range(0, bottom + 1, 4))
        near = sorted(grid, key=lambda p, at=at_box[0]: (p[0] - at[0]) ** 2 + (p[1] - at[1]) ** 2)
        x, y = next((p for p in (*at_box, *near) if _is_free(p, width, height, taken)), at_box[0])
        taken.append((x, y, x + width, y + height))
        places.append((x, y, None if (x, y) in at_box else (x1, y1)))
    return places


def _is_free(
    place: tuple[int, int], width: int, height: int, taken: Sequence[tuple[int, int, int, int]]
) -> bool:
    x, y = place
    return all(
        x >= right or x + width <= left or y >= bottom or y + height <= top
        for left, top, right, bottom in taken
    )


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


PICTURED = 8  # images in a picture


def write_picture(
    path: Path, paths: CocoPaths, masks: bool, results: Sequence[Result], count: int = PICTURED
) -> None:
    """Draws the first `count` images of a data set, ground truth left and detections right.

    Args:
        paths: of the data set.
        masks: whether they are drawn, too.
        results: in COCO's format, of these images among others.
    """
    split = load_split(paths, masks, drop_crowds=False)
    dataset = CocoDataset(split, first_label=0)
    images, truths, found = [], [], []
    for index in range(min(count, len(split))):
        sample = dataset[(0, index)]
        if isinstance(sample, BrokenImageError):
            continue
        image, truth, image_id = sample
        images.append(image)
        truths.append(truth)
        mine = [result for result in results if result["image_id"] == image_id]
        found.append(_as_tensors(mine, split.category_ids, split.masks is not None))
    write_atomically(path, png(side_by_side(images, truths, found, split.classes)))


def _as_tensors(
    results: Sequence[Result], category_ids: Sequence[int], masks: bool
) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([result["bbox"] for result in results]).reshape(-1, 4)
    found = {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "scores": torch.tensor([result["score"] for result in results]),
        "labels": torch.tensor([category_ids.index(r["category_id"]) for r in results]),
    }
    if masks and results:
        decoded = [
            coco_masks.decode(coco_masks.to_rle(r["segmentation"], *r["segmentation"]["size"]))
            for r in results
        ]
        found["masks"] = torch.from_numpy(np.stack(decoded))
    return found

"""Draws boxes, masks, classes and scores on images, and ground truth beside predictions."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from utils.data import coco_masks
from utils.data.coco import CocoPaths
from utils.data.coco_dataset import CocoDataset, CocoSplit, load_split
from utils.data.coco_eval import Result
from utils.data.sampler import SeededBatches
from utils.system.style import LARGE_CELL, Cell, draw_grid, encoded, fit, font
from utils.system.text import counted, printable

# Of Okabe and Ito, for people with any form of colour blindness, each with black text on it.
COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#2fbf8f", "#ff7f50", "#e69ac4", "#b3b3ff", "#c8e06c")
BORDER, TITLE = 4, 24  # pixels between pictures, and of the line above them
TEXT = 12  # pixels of a label's letters
SHARE = 0.45  # of a mask's colour in its pixels
PICTURED, SHOWN = 4, 16  # images in a run's predictions.png, and in its batch.png
LARGEST = 1000  # pixels of a drawn picture's longer side


def draw(
    image: Tensor, objects: dict[str, Tensor], names: Sequence[str], least_score: float = 0.0
) -> Tensor:
    """Draws boxes, masks and labels on a picture; the surest on top.

    Args:
        image: (3, H, W) uint8.
        objects: boxes (n, 4), labels (n,) indices into `names`, and where known scores (n,) and
            masks (n, H, W) or (n, 1, H, W), 0 to 1.
        least_score: objects under it are not drawn.

    Returns:
        (3, H, W) uint8.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks  # slow to import

    objects = {k: v.detach().cpu() for k, v in objects.items()}
    if "scores" in objects:
        order = objects["scores"].argsort(descending=True, stable=True)
        order = order[objects["scores"][order] >= least_score]
        objects = {k: v[order] for k, v in objects.items()}
    if not len(objects["boxes"]):
        return image
    labels = objects["labels"].tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    captions = [printable(names[label]) for label in labels]
    if "scores" in objects:
        scores = objects["scores"].tolist()
        captions = [f"{c} {score:.2f}" for c, score in zip(captions, scores, strict=True)]
    if "masks" in objects:
        masks = objects["masks"].reshape(len(labels), *image.shape[1:]) > 0.5
        masks &= masks.cumsum(0) == 1  # torchvision blackens what two masks have
        image = draw_segmentation_masks(image, masks, SHARE, colours)
    boxes = objects["boxes"].round()
    image = draw_bounding_boxes(image, boxes.flip(0), colors=colours[::-1])
    picture = as_image(image)
    pen, small = ImageDraw.Draw(picture), font(TEXT)
    captions = [fit(pen, caption, small, picture.width - 4) for caption in captions]
    sizes = [(round(pen.textlength(text, small)) + 4, TEXT + 4) for text in captions]
    corners = place_labels(boxes.int().tolist(), sizes, picture.size)
    labelled = list(zip(corners, sizes, captions, colours, strict=True))
    for (x, y), (width, height), text, colour in reversed(labelled):
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        pen.text((x + 2, y + height / 2), text, "black", small, anchor="lm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def place_labels(
    boxes: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> list[tuple[int, int]]:
    """Returns the left and top of each label, the first ones first, at its own box.

    A label stands where it first covers no earlier label, else where it covers least: at one of the
    box's corners, outside and inside, or further down along its sides.

    Args:
        boxes: x1, y1, x2, y2 in pixels.
        sizes: width and height of each label, not larger than the canvas.
        canvas: width and height of the picture.
    """
    taken: list[tuple[int, int, int, int]] = []
    for (x1, y1, x2, y2), (width, height) in zip(boxes, sizes, strict=True):
        right, bottom = canvas[0] - width, canvas[1] - height
        inside = range(y1, max(y1, y2 - height) + 1, height)
        rows = (y1 - height, y2, y1, y2 - height, *inside)
        tried = [
            (max(0, min(x, right)), max(0, min(y, bottom)))
            for y, x in [*product(rows, (x1, x2 - width)), *product(inside, (x2, x1 - width))]
        ]
        here = [(x, y, x + width, y + height) for x, y in tried]
        taken.append(min(here, key=lambda label: _covered(label, taken)))
    return [(x, y) for x, y, _, _ in taken]


def _covered(label: Sequence[int], taken: Sequence[Sequence[int]]) -> int:
    """Returns how many pixels of earlier labels a label covers; both are x1, y1, x2, y2."""
    return sum(
        max(0, min(label[2], right) - max(label[0], left))
        * max(0, min(label[3], low) - max(label[1], top))
        for left, top, right, low in taken
    )


def resized(
    image: Tensor, objects: dict[str, Tensor], least: int, most: int = LARGEST
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns image and objects at a size at which labels can be read.

    Args:
        least: pixels that the longer side gets about, by a whole factor.
        most: pixels to which a longer one is reduced.
    """
    longest = max(image.shape[1:])
    scale = most / longest if longest > most else max(1, round(least / longest))
    if scale == 1:
        return image, objects
    size = [max(1, round(scale * n)) for n in image.shape[1:]]
    pixels, soft = ("nearest", "nearest") if scale > 1 else ("area", "bilinear")
    image = F.interpolate(image[None].float(), size, mode=pixels)[0].round().to(torch.uint8)
    objects = {**objects, "boxes": objects["boxes"] * scale}
    if "masks" in objects:
        masks = objects["masks"].reshape(len(objects["boxes"]), 1, *objects["masks"].shape[-2:])
        objects["masks"] = F.interpolate(masks.float(), size, mode=soft)[:, 0]
    return image, objects


def as_image(picture: Tensor) -> Image.Image:
    """Returns a (3, H, W) uint8 picture for Pillow."""
    return Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))


def side_by_side(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    predictions: Sequence[dict[str, Tensor]],
    names: Sequence[str],
    columns: int = 2,
    least_score: float = 0.5,
    side: int = 320,
) -> Image.Image:
    """Draws pairs of pictures, ground truth left and predictions right, in one, with titles.

    Args:
        images: (3, H, W) uint8 each.
        targets, predictions: as `draw` takes them.
        columns: pairs in a row.
        side: pixels that an image's longer side gets about, see `resized`.
    """
    pictures = []
    for image, target, predicted in zip(images, targets, predictions, strict=True):
        pictures.append(draw(*resized(image, target, side), names))
        pictures.append(draw(*resized(image, predicted, side), names, least_score))
    step_y, step_x = (
        max((picture.shape[axis] for picture in pictures), default=side) + BORDER for axis in (1, 2)
    )
    across = 2 * min(columns, max(1, len(images)))
    down = -(-len(pictures) // across)
    page = Image.new("RGB", (BORDER + across * step_x, TITLE + BORDER + down * step_y), "white")
    pen, small = ImageDraw.Draw(page), font(TEXT + 1)
    for i in range(across):
        title = f"Predictions, score ≥ {least_score:g}" if i % 2 else "Ground truth"
        at = (BORDER + (i + 0.5) * step_x - BORDER / 2, TITLE / 2 + 2)
        pen.text(at, fit(pen, title, small, step_x - BORDER), "black", small, anchor="mm")
    for i, picture in enumerate(pictures):
        at = (BORDER + i % across * step_x, TITLE + BORDER + i // across * step_y)
        page.paste(as_image(picture), at)
    return page


def draw_predictions(
    paths: CocoPaths,
    masks: bool,
    results: Sequence[Result],
    images: Sequence[int] = range(PICTURED),
) -> bytes:
    """Draws images of a data set as a PNG, ground truth left and predictions right.

    Args:
        results: in COCO's format, of these images among others.
        images: their numbers in the data set; those beyond it are left out.
    """
    split = load_split(paths, masks, drop_crowds=False)
    dataset = CocoDataset(split, first_label=0)
    pixels, targets, predictions = [], [], []
    for index in images:
        sample = dataset[0, index] if index < len(split) else None
        if isinstance(sample, tuple):  # else it cannot be read
            image, target, image_id = sample
            own = [result for result in results if result["image_id"] == image_id]
            pixels.append(image)
            targets.append(target)
            predictions.append(as_tensors(own, split.category_ids))
    return encoded(side_by_side(pixels, targets, predictions, split.classes))


def draw_first_batch(split: CocoSplit, order: SeededBatches, hflip: float) -> bytes | None:
    """Draws the images of a run's first batch with their objects, before the network resizes them.

    Args:
        order: of the batches; it seeks the first one.

    Returns:
        A PNG; None where an image cannot be read, which training will say.
    """
    order.seek(0)
    dataset, keys = CocoDataset(split, 0, hflip, order.seed), next(iter(order))
    cells = []
    for key in keys[:SHOWN]:
        sample = dataset[key]
        if isinstance(sample, Exception):
            return None
        image, target, _ = sample
        drawn = draw(*resized(image, target, LARGE_CELL, LARGE_CELL), split.classes)
        note = f"{counted(len(target['labels']), 'object')}, {image.shape[2]} x {image.shape[1]}"
        cells.append(Cell(as_image(drawn), Path(split.file_names[key[1]]).name, note))
    return draw_grid(cells, f"first batch, {len(cells)} of {len(keys)} images", LARGE_CELL)


def as_tensors(results: Sequence[Result], category_ids: Sequence[int]) -> dict[str, Tensor]:
    """Returns the results of one image as `draw` takes them."""
    boxes = torch.tensor([result["bbox"] for result in results]).reshape(-1, 4)
    objects = {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "scores": torch.tensor([result["score"] for result in results]),
        "labels": torch.tensor([category_ids.index(r["category_id"]) for r in results]),
    }
    if results and "segmentation" in results[0]:
        masks = [r["segmentation"] for r in results]
        decoded = [coco_masks.decode(coco_masks.to_rle(m, *m["size"]) or m) for m in masks]
        objects["masks"] = torch.from_numpy(np.stack(decoded))
    return objects

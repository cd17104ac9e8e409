"""Writes a COCO tree without a download: handwritten digits pasted over two photographs.

The digits and the photographs come with scikit-learn. Every pixel of a mask was painted by its
digit and every pixel that a digit painted, and no later digit covered, is in its mask.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.data.coco_masks import run_lengths
from utils.data.demo_sets import HOME, SPLIT_SEED, VAL_SHARE, write_once
from utils.system.distributed import Context, share
from utils.system.errors import UserError
from utils.system.files import write_atomically

SHAPES = "demo:shapes"
SIDE = 96  # of an image, in pixels
COUNTS = {"train": 800, "val": 80}
DIGITS = (0, 1, 2, 3, 4)
OBJECTS = (1, 2)  # in an image, ends included
SIZES = (28, 60)  # of a digit, in pixels
INK = 0.35  # of full ink: where the stroke ends
VISIBLE = 0.8  # of a digit's pixels that later ones must leave
# Small images, small digits, never mirrored, and few regions: a CPU is to learn it in minutes.
RECIPE = {
    "arch": "mask_rcnn",
    "backbone": "eca_resnet18",
    "epochs": 3,
    "batch_size": 8,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "lr_steps": (2,),
    "lr_decay": 0.2,
    "warmup_steps": 20,
    "clip": 10.0,
    "min_size": (96,),
    "max_size": 96,
    "hflip": 0.0,
}
ANY = {"anchor_scale": 4.0, "mask_pool": 7, "width": 64}  # settings of any detector
SINGLE_STAGE = {**ANY, "topk_candidates": 200, "detections_per_img": 10}
TWO_STAGES = {
    **ANY,
    "rpn_pre_nms_top_n_train": 500,
    "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 50,
    "rpn_batch_size_per_image": 64,
    "box_batch_size_per_image": 16,
    "box_positive_fraction": 0.5,
    "box_detections_per_img": 10,
}
FRONTIER = 480  # column of the 640-wide photographs: train looks left of it, val right


def recipe_of(arch: str | None) -> dict[str, Any]:
    """Returns the settings of the demo that differ from COCO's, where the detector knows them."""
    settings = SINGLE_STAGE if arch == "retinanet" else TWO_STAGES
    return {**RECIPE, "settings": settings}


def find_root(data: str, context: Context) -> str | Path:
    """Returns the folder that DATA names; rank 0 writes demo data while the others wait."""
    if data == SHAPES:
        data = share(prepare() if context.is_main else None, context)
    return data


def prepare(home: Path = HOME) -> Path:
    """Returns the folder of the demo's COCO tree, which is written the first time.

    Raises:
        UserError: scikit-learn is not installed.
    """
    return write_once(home / "shapes", write_shapes)


def write_shapes(folder: Path, counts: dict[str, int] | None = None, side: int = SIDE) -> None:
    """Writes folder/{train2017,val2017}/*.png and folder/annotations/instances_*.json.

    The same files every time. The two splits share neither a digit's scan nor a photograph's pixel.

    Args:
        counts: images in "train" and "val"; None for `COUNTS`.
        side: of the square images, in pixels, at most 160.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        raise UserError(
            "the digits and photographs come with scikit-learn, which is not installed: "
            "pip install -r requirements-dev.txt"
        ) from None
    digits, photos = load_digits(), load_sample_images().images
    held_out = np.random.default_rng(SPLIT_SEED).random(len(digits.target)) < VAL_SHARE
    (folder / "annotations").mkdir(parents=True)
    for part, number in (counts or COUNTS).items():
        chance = np.random.default_rng((SPLIT_SEED, part == "val"))
        columns = slice(FRONTIER, None) if part == "val" else slice(FRONTIER)
        views = [photo[:, columns] for photo in photos]
        members = np.flatnonzero((held_out == (part == "val")) & np.isin(digits.target, DIGITS))
        of_part = folder / f"{part}2017"
        of_part.mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, number + 1):
            name = f"{image_id:06d}.png"
            chosen = chance.choice(members, chance.integers(OBJECTS[0], OBJECTS[1] + 1))
            scans = [(digits.images[i] / 16, int(digits.target[i])) for i in chosen]
            pixels, objects = compose(scans, views, side, chance)
            Image.fromarray(pixels).save(of_part / name)
            images.append({"id": image_id, "file_name": name, "height": side, "width": side})
            for mask, label in objects:
                annotations.append(_annotation(len(annotations) + 1, image_id, mask, label))
        content = {
            "info": {"description": "scikit-learn's digits over its sample photographs"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": n + 1, "name": f"digit {n}"} for n in DIGITS],
        }
        path = folder / "annotations" / f"instances_{part}2017.json"
        write_atomically(path, json.dumps(content).encode())


def compose(
    scans: list[tuple[np.ndarray, int]],
    photos: list[np.ndarray],
    side: int,
    chance: np.random.Generator,
) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """Pastes digits over a random piece of a photograph.

    Args:
        scans: (8 × 8 ink from 0 to 1, label) of each digit.
        photos: (H, W, 3) uint8, at least `side` on a side.

    Returns:
        The (side, side, 3) uint8 picture, and (its (side, side) mask, label) of each digit. A digit
        that would cover too much of an earlier one is left out.
    """
    photo = photos[chance.integers(len(photos))]
    top, left = (chance.integers(0, n - side + 1) for n in photo.shape[:2])
    canvas = photo[top : top + side, left : left + side].copy()
    objects: list[tuple[np.ndarray, int]] = []
    for scan, label in scans:
        size = int(chance.integers(SIZES[0], min(SIZES[1], side) + 1))
        ink = np.asarray(
            Image.fromarray(scan.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        )
        y, x = chance.integers(0, side - size + 1, 2)
        mask = np.zeros((side, side), dtype=bool)
        mask[y : y + size, x : x + size] = ink > INK
        left_over = [seen & ~mask for seen, _ in objects]
        if any(
            new.sum() < VISIBLE * old.sum()
            for new, (old, _) in zip(left_over, objects, strict=True)
        ):
            continue
        # Ink that a person could see: dark on what is bright, and the other way round.
        dark = canvas[mask].mean() > 128
        canvas[mask] = chance.integers(0, 90, 3) if dark else chance.integers(166, 256, 3)
        objects = [(new, kind) for new, (_, kind) in zip(left_over, objects, strict=True)]
        objects.append((mask, label))
    return canvas, objects


def _annotation(number: int, image_id: int, mask: np.ndarray, label: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }

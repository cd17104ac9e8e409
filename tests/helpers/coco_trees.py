"""Small COCO trees for the detection tests; of the demo's, the classes and flags that suit it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.coco import locate
from utils.data.coco_dataset import load_split

DIGITS = [f"digit {n}" for n in range(5)]
NETWORK = ("-a", "retinanet", "-b", "eca_resnet18", "--min-size", 64, "--max-size", 64, "-j", 0)
SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 40.0, 10.0, 40.0]]


def annotation(number=1, image_id=1, category_id=1, bbox=(10, 10, 20, 30), **changes):
    entry = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        "area": bbox[2] * bbox[3],
        "iscrowd": 0,
        "segmentation": SQUARE,
    }
    entry.update(changes)
    return {key: value for key, value in entry.items() if value is not None}


def write_tree(
    root: Path, annotations: list[dict], images: int = 3, part: str = "val", size=(48, 64)
) -> Path:
    """`images` random pictures of height and width `size`, ids 1 and up, categories 1 and 7."""
    folder = root / f"{part}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    chance = np.random.default_rng(0)
    entries = []
    for image_id in range(1, images + 1):
        name = f"picture-{image_id}.png"
        pixels = chance.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        entries.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
    content = {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}],
    }
    (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return root


def split_of(root, annotations, masks=True, images=3, **kwargs):
    """The split that is read from a tree."""
    return load_split(locate(write_tree(root, annotations, images), "val"), masks, **kwargs)


def edit(root, change):
    """Changes a tree's annotations; returns where they are."""
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return locate(root, "val")

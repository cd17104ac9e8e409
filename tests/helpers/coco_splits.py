"""Splits read from small COCO trees, as they are written or with an edited file."""

import json

from helpers.coco_trees import write_tree

from utils.data.coco import locate
from utils.data.coco_dataset import load_split


def split_of(root, annotations, masks=True, images=3, **kwargs):
    return load_split(locate(write_tree(root, annotations, images), "val"), masks, **kwargs)


def edit(root, change):
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return locate(root, "val")

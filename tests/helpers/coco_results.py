"""Objects and detections by chance, and pycocotools' figures for them."""

import contextlib
import io
import json

import numpy as np
from helpers.coco_trees import annotation, write_tree

from utils.data import coco_masks
from utils.data.coco import locate

SIZE = (48, 64)


def random_case(root, images=12, seed=0, crowds=True):
    """A tree of random objects, and detections that hit, miss and repeat them, with masks."""
    chance = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        for _ in range(int(chance.integers(0, 5))):
            w, h = chance.integers(4, 40, 2)
            x, y = chance.integers(0, SIZE[1] - w + 1), chance.integers(0, SIZE[0] - h + 1)
            x, y, w, h = map(int, (x, y, w, h))
            category = int(chance.choice([1, 7]))
            mask = np.zeros(SIZE, dtype=bool)
            mask[y : y + h, x : x + w] = chance.random((h, w)) < 0.8
            counts = {"size": list(SIZE), "counts": coco_masks.run_lengths(mask)}
            annotations.append(
                annotation(
                    len(annotations) + 1,
                    image_id,
                    category,
                    (x, y, w, h),
                    segmentation=counts,
                    area=int(mask.sum()),
                    iscrowd=int(crowds and chance.random() < 0.1),
                )
            )
            for _ in range(int(chance.integers(0, 3))):
                shift = chance.normal(0, 1, 4)
                seen = mask ^ (chance.random(SIZE) < 0.05)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if chance.random() < 0.8 else 8 - category,
                        "bbox": [float(v + s) for v, s in zip((x, y, w, h), shift, strict=True)],
                        "score": float(chance.random()),
                        "segmentation": coco_masks.encode(seen[None])[0],
                    }
                )
    return locate(write_tree(root, annotations, images), "val"), results


def by_hand(paths, results, kind):
    """pycocotools, fed as its own examples do: from files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    drop = "segmentation" if kind == "bbox" else "bbox"
    path = paths.annotations.with_name("results.json")
    path.write_text(json.dumps([{k: v for k, v in r.items() if k != drop} for r in results]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(paths.annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(path)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation

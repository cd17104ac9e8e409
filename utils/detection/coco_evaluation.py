"""Computes COCO's twelve figures from detections, and writes detections in COCO's format.

faster-coco-eval does the counting where it is installed, else pycocotools; their figures agree.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.detection import coco_masks
from utils.detection.coco_files import Place
from utils.detection.coco_truth import JudgedObjects
from utils.system.distributed import Context, share
from utils.system.errors import UserError
from utils.system.files import write_atomically

FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)
BACKENDS = ("faster-coco-eval", "pycocotools")
MASK_THRESHOLD = 0.5

Result = dict[str, Any]  # of one detection: image_id, category_id, score, bbox, segmentation


@dataclass(frozen=True)
class Summary:
    """Holds what COCO reports for boxes or for masks, from 0 to 1; -1 where nothing was to be
    found.

    Attributes:
        figures: `FIGURES` to values. AP is the mean over IoU 0.50 to 0.95; s, m, l are objects
            under 32², under 96² and over; ARn allows n detections an image.
        per_class: class name to AP.
    """

    figures: dict[str, float]
    per_class: dict[str, float]


def to_results(
    found: dict[str, torch.Tensor],
    image_id: int,
    category_ids: Sequence[int | None],
    first_label: int,
) -> list[Result]:
    """Returns one image's detections in COCO's result format.

    Args:
        found: boxes (n, 4) as x1, y1, x2, y2, labels (n,), scores (n,), and with masks (n, 1, H, W)
            from 0 to 1, all in the pixels of the image file.
        category_ids: id of the class that has the label `first_label`, of the next one, and so on.
            None for a class that the file does not know; its detections are left out.

    Raises:
        UserError: a box or score is not finite.
    """
    known = [
        i
        for i, k in enumerate(found["labels"].tolist())
        if category_ids[k - first_label] is not None
    ]
    if len(known) < len(found["labels"]):
        found = {name: value[known] for name, value in found.items()}
    boxes, scores = found["boxes"].float().cpu(), found["scores"].float().cpu()
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise UserError(
            f"image {image_id}: a detection is not finite; the weights are ruined, or --amp fp16 "
            "overflows"
        )
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    results: list[Result] = [
        {
            "image_id": image_id,
            "category_id": category_ids[label - first_label],
            "bbox": box,
            "score": score,
        }
        for box, label, score in zip(
            torch.cat([corners, sizes], 1).tolist(),
            found["labels"].tolist(),
            scores.tolist(),
            strict=True,
        )
    ]
    if "masks" in found:
        masks = (found["masks"][:, 0] > MASK_THRESHOLD).cpu().numpy()
        for result, mask in zip(results, coco_masks.encode(masks), strict=True):
            result["segmentation"] = mask
    return results


def gather(results: list[Result], context: Context) -> list[Result] | None:
    """Returns all ranks' results, by image, on rank 0; None on the others."""
    if context.world_size > 1:
        parts: list | None = [None] * context.world_size if context.is_main else None
        dist.gather_object(results, parts, 0, group=context.votes)
        if parts is None:
            return None
        results = [result for part in parts for result in part]
    return sorted(results, key=lambda result: result["image_id"])


def write_results(path: Path, results: list[Result]) -> None:
    """Writes detections as COCO's servers and tools read them."""
    write_atomically(path, json.dumps(results).encode())


class GroundTruth:
    """Judges detections by COCO's rules.

    Args:
        place: the annotations. masks, classes: see `JudgedObjects`.

    Attributes:
        objects: that are to be found.

    Raises:
        UserError: the file is no COCO file, or no evaluator is installed.
    """

    def __init__(self, place: Place, masks: bool, classes: Sequence[str] = ()):
        find_backend()  # now, and not after an epoch of training
        self.objects = JudgedObjects(place, masks, classes)

    def judge(self, results: list[Result], backend: str | None = None) -> dict[str, Summary]:
        """Returns COCO's figures of `results`: {"bbox": Summary} and, with masks, "segm".

        Args:
            results: of all ranks, with the file's own ids; they stay as they are.
            backend: one of `BACKENDS`; None for the first that is installed.

        Raises:
            UserError: no backend is installed, or a result is of an unknown image or category.
        """
        objects = self.objects
        for key, known in (("image", objects.image_numbers), ("category", objects.class_numbers)):
            foreign = {result[f"{key}_id"] for result in results} - known.keys()
            if foreign:
                raise UserError(
                    f"detections of {key} {min(foreign)}, which is not in the annotations"
                )
        coco, evaluator = find_backend(backend)
        with contextlib.redirect_stdout(io.StringIO()):  # both narrate
            return {kind: self._judge(coco, evaluator, results, kind) for kind in objects.kinds}

    def _judge(self, coco: type, evaluator: type, results: list[Result], kind: str) -> Summary:
        objects = self.objects
        truth = _indexed(coco, objects.dataset(objects.annotations[kind]))
        # Without "bbox" a mask's size class goes by its pixels, with it by its box's area.
        shape = "segmentation" if kind == "segm" else "bbox"
        plain = [
            {
                "image_id": objects.image_numbers[result["image_id"]],
                "category_id": objects.class_numbers[result["category_id"]],
                "score": result["score"],
                shape: result[shape],
            }
            for result in results
        ]
        # pycocotools cannot load an empty list.
        found = truth.loadRes(plain) if plain else _indexed(coco, objects.dataset([]))
        judged = evaluator(truth, found, kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        figures = {name: float(v) for name, v in zip(FIGURES, judged.stats, strict=False)}
        precision = np.asarray(judged.eval["precision"])[..., 0, -1]  # IoU, recall, class
        per_class = {}
        for i, name in enumerate(objects.names):
            of_class = precision[:, :, i]
            of_class = of_class[of_class > -1]
            per_class[name] = float(of_class.mean()) if of_class.size else -1.0
        return Summary(figures, {**per_class, **dict.fromkeys(objects.other_names, -1.0)})


def judge(
    found: list[Result], truth: GroundTruth, context: Context
) -> tuple[list[Result] | None, dict[str, Summary]]:
    """COCO's figures of all ranks' detections, on every rank; the detections on rank 0 alone."""
    results = gather(found, context)
    return results, share(truth.judge(results) if context.is_main else None, context)


def find_backend(name: str | None = None) -> tuple[type, type]:
    """Returns the classes COCO and COCOeval of the backend `name`, or of the first installed one.

    Raises:
        UserError: it is not installed.
    """
    for known in BACKENDS if name is None else (name,):
        try:
            if known == "faster-coco-eval":
                from faster_coco_eval import COCO, COCOeval_faster

                return COCO, COCOeval_faster
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            return COCO, COCOeval
        except ImportError:
            continue
    raise UserError(
        f"COCO's figures need {name or ' or '.join(BACKENDS)}: pip install -r requirements.txt"
    )


def _indexed(coco: type, dataset: dict[str, Any]) -> Any:
    indexed = coco()
    indexed.dataset = dataset
    indexed.createIndex()
    return indexed

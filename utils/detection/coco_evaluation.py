"""COCO's twelve figures from detections, and the detections in COCO's result format.

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
from utils.detection.coco_files import Place, box_fault, check_references, is_finite, read_json
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
    """What COCO reports for boxes or for masks, from 0 to 1; -1 where nothing was to be found.

    Attributes:
        figures: `FIGURES` to values. AP is the mean over IoU 0.50 to 0.95; s, m, l are objects
            under 32², under 96² and over; ARn allows n detections an image.
        per_class: class name to AP.
    """

    figures: dict[str, float]
    per_class: dict[str, float]


def to_results(
    found: dict[str, torch.Tensor], image_id: int, category_ids: Sequence[int], first_label: int
) -> list[Result]:
    """One image's detections in COCO's result format.

    Args:
        found: boxes (n, 4) as x1, y1, x2, y2, labels (n,), scores (n,), and with masks (n, 1, H, W)
            from 0 to 1, all in the pixels of the image file.
        category_ids: id of the class that has the label `first_label`, of the next one, and so on.

    Raises:
        UserError: a box or score is not finite.
    """
    boxes, scores = found["boxes"].float().cpu(), found["scores"].float().cpu()
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise UserError(
            f"image {image_id}: a detection is not finite; the weights are ruined, or --amp fp16 "
            "overflows"
        )
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    results: list[Result] = [
        {
            "image_id": int(image_id),
            "category_id": int(category_ids[label - first_label]),
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
    """All ranks' results, by image, on rank 0; None on the others."""
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
    """The objects that detections are held against: those of a COCO file, ids and areas filled in.

    Args:
        place: its annotations.
        masks: whether masks are judged, too; then an object without one is left out.

    Attributes:
        lines: what was left out, in words.

    Raises:
        UserError: the file is no COCO file (see `read_json`), or no evaluator is installed.
    """

    def __init__(self, place: Place, masks: bool):
        find_backend()  # now, and not after an epoch of training
        content = read_json(place)
        check_references(place.annotations, content)
        images = {image["id"]: image for image in content["images"]}
        self.image_ids = sorted(images)
        self.categories = sorted(content["categories"], key=lambda category: category["id"])
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        annotations, self.left_out = [], 0
        for entry in content["annotations"]:
            kept = _complete(entry, images[entry["image_id"]], masks)
            if kept is None:
                self.left_out += 1
            else:  # COCO's own numbers may repeat or be 0, which its code takes for "no match"
                annotations.append({**kept, "id": len(annotations) + 1})
        self.content = {
            "info": {},
            "images": [images[i] for i in self.image_ids],
            "annotations": annotations,
            "categories": self.categories,
        }

    @property
    def lines(self) -> list[str]:
        if not self.left_out:
            return []
        what = "objects without a finite box, or without a mask"
        return [f"  not evaluated: {self.left_out:,} {what}"]

    def judge(self, results: list[Result], backend: str | None = None) -> dict[str, Summary]:
        """COCO's figures of `results`: {"bbox": Summary} and, with masks, "segm".

        Args:
            results: of all ranks; they stay as they are.
            backend: one of `BACKENDS`; None for the first that is installed.

        Raises:
            UserError: no backend is installed, or a result is of an unknown image.
        """
        foreign = {result["image_id"] for result in results} - set(self.image_ids)
        if foreign:
            raise UserError(f"detections of image {min(foreign)}, which is not in the annotations")
        coco, evaluator = find_backend(backend)
        with contextlib.redirect_stdout(io.StringIO()):  # both narrate
            truth = _index(coco, self.content)
            return {kind: self._judge(coco, evaluator, truth, results, kind) for kind in self.kinds}

    def _judge(
        self, coco: type, evaluator: type, truth: Any, results: list[Result], kind: str
    ) -> Summary:
        # Without "bbox" a mask's size class goes by its pixels, with it by its box's area.
        unwanted = "bbox" if kind == "segm" else "segmentation"
        plain = [{k: v for k, v in r.items() if k != unwanted} for r in results]
        # pycocotools cannot load an empty list.
        nothing = {**self.content, "annotations": []}
        found = truth.loadRes(plain) if plain else _index(coco, nothing)
        judged = evaluator(truth, found, kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        figures = {name: float(v) for name, v in zip(FIGURES, judged.stats, strict=False)}
        precision = np.asarray(judged.eval["precision"])[..., 0, -1]  # IoU, recall, class
        per_class = {}
        for i, category in enumerate(self.categories):
            of_class = precision[:, :, i]
            of_class = of_class[of_class > -1]
            per_class[str(category["name"])] = float(of_class.mean()) if of_class.size else -1.0
        return Summary(figures, per_class)


def judge(
    found: list[Result], truth: GroundTruth, context: Context
) -> tuple[list[Result] | None, dict[str, Summary]]:
    """COCO's figures of all ranks' detections, on every rank; the detections on rank 0 alone."""
    results = gather(found, context)
    return results, share(truth.judge(results) if context.is_main else None, context)


def find_backend(name: str | None = None) -> tuple[type, type]:
    """The classes COCO and COCOeval of the backend `name`, or of the first installed one.

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


def _index(coco: type, content: dict[str, Any]) -> Any:
    indexed = coco()  # evaluation writes into the annotations, so these are copies
    indexed.dataset = {**content, "annotations": [dict(a) for a in content["annotations"]]}
    indexed.createIndex()
    return indexed


def _complete(entry: dict, image: dict, masks: bool) -> dict | None:
    """An annotation with all that the evaluation reads; None if it cannot be judged."""
    if box_fault(entry["bbox"]):
        return None
    whole = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
    whole["iscrowd"] = int(bool(entry.get("iscrowd", 0)))
    if masks:
        rle = coco_masks.to_rle(entry.get("segmentation"), image["height"], image["width"])
        if rle is None:
            return None
        whole["segmentation"] = rle
    area = entry.get("area")
    if not is_finite(area) or area < 0:  # missing, or as good as missing
        area = coco_masks.area(rle) if masks else entry["bbox"][2] * entry["bbox"][3]
    return {**whole, "area": area}

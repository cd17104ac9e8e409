"""Computes COCO's twelve figures: the objects with ids and areas filled in, and detections.

faster-coco-eval does the counting; tests compare it with pycocotools.
"""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.data import coco, coco_masks
from utils.system.distributed import Context, share
from utils.system.errors import UserError, require
from utils.system.files import write_atomically
from utils.system.text import counted

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_THRESHOLD = 0.5
MOST_DETECTIONS = 100  # of an image, in COCO's figures
KINDS = {"bbox": "box", "segm": "mask"}  # COCO's words, and the columns'

Result = dict[str, Any]  # of one detection: image_id, category_id, score, bbox, segmentation


@dataclass(frozen=True)
class Summary:
    """Holds what COCO reports for boxes or for masks, from 0 to 1; -1 where there was no object."""

    # `FIGURES` to values. AP is the mean over IoU 0.50 to 0.95; s, m, l are objects under 32²,
    # under 96² and over; ARn allows n detections an image.
    figures: dict[str, float]
    per_class: dict[str, float]  # class name to AP


@dataclass(frozen=True)
class ClassPrecisions:
    """Holds COCO's figures of each class, (C,) from 0 to 1; -1 where a class has no object."""

    names: list[str]  # of the classes
    objects: np.ndarray  # (C,) int64, without crowds
    ap: np.ndarray  # over IoU 0.50 to 0.95
    recall: np.ndarray  # at IoU 0.50 with 100 detections an image
    precision: np.ndarray  # (C, 101) at IoU 0.50, at a recall of 0, 0.01, …, 1. Its mean is AP50.


def to_results(
    detections: dict[str, torch.Tensor],
    image_id: int,
    category_ids: Sequence[int | None],
    first_label: int,
) -> list[Result]:
    """Returns one image's detections in COCO's result format.

    Args:
        detections: boxes (n, 4) as x1, y1, x2, y2, labels (n,), scores (n,), and with masks
            (n, 1, H, W) from 0 to 1, all in the pixels of the image file.
        category_ids: id of the class that has the label `first_label`, of the next one, and so on.
            None for a class that the file does not know; its detections are left out.

    Raises:
        UserError: a box or score is not finite.
    """
    boxes, scores = (detections[name].float().cpu() for name in ("boxes", "scores"))
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise UserError(
            f"image {image_id}: a detection is not finite; the weights are ruined, or --amp fp16 "
            "overflows"
        )
    ids = [category_ids[label - first_label] for label in detections["labels"].tolist()]
    rectangles = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    results: list[Result] = [
        {"image_id": image_id, "category_id": ids[i], "bbox": rectangles[i], "score": score}
        for i, score in enumerate(scores.tolist())
        if ids[i] is not None
    ]
    if "masks" in detections:
        known = [i for i, category_id in enumerate(ids) if category_id is not None]
        masks = (detections["masks"][known, 0] > MASK_THRESHOLD).cpu().numpy()
        for result, mask in zip(results, coco_masks.encode(masks), strict=True):
            result["segmentation"] = mask
    return results


def gather(results: list[Result], context: Context) -> list[Result] | None:
    """Returns all ranks' results, by image, on rank 0; None on the others."""
    if context.world_size > 1:
        parts: list[Any] | None = [None] * context.world_size if context.is_main else None
        dist.gather_object(results, parts, 0, group=context.votes)
        if parts is None:
            return None
        results = [result for part in parts for result in part]
    return sorted(results, key=lambda result: result["image_id"])


def write_results(path: Path, results: list[Result]) -> None:
    """Writes detections as COCO's servers and tools read them."""
    write_atomically(path, json.dumps(results).encode())


class GroundTruth:
    """Holds a COCO file's objects, and evaluates detections by COCO's rules.

    Boxes are evaluated on every object with a finite box. An object without a usable mask is
    ignored where masks are: its box is a crowd's, in which detections are neither right nor wrong.

    Images, classes and objects are numbered from 1 here, as COCO's code reads ids into floats,
    which tell no two integers above 2^53 from one another.

    Args:
        classes: names that are reported besides the file's own; their AP is -1.

    Attributes:
        kinds: what is evaluated: "bbox", and "segm" with masks.
        image_numbers, class_numbers: the file's id → number, by id.
        names: of the classes. other_names: those of `classes` that the file lacks.
        annotations: of each kind, with all that the evaluation reads.

    Raises:
        UserError: the file is no COCO file, see `CocoFile`; no evaluator is installed.
    """

    def __init__(self, paths: coco.CocoPaths, masks: bool, classes: Sequence[str] = ()):
        # Now, and not after an epoch of training.
        require(("faster_coco_eval",), "COCO's evaluation", "-r requirements.txt")
        file = coco.CocoFile(paths)
        self.image_numbers = {key: number for number, key in enumerate(sorted(file.images), 1)}
        self.class_numbers = {key: number for number, key in enumerate(file.categories, 1)}
        self.images = [file.images[key] for key in self.image_numbers]
        self.names = list(file.categories.values())
        self.other_names = [name for name in classes if name not in self.names]
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        self.annotations: dict[str, list[dict[str, Any]]] = {kind: [] for kind in self.kinds}
        self.notes = coco.ObjectNotes()
        for entry, image in file.objects():
            self._add(entry, image)

    def _add(self, entry: coco.Annotation, image: coco.Image) -> None:
        """Adds an object to the kinds in which it can be evaluated, and notes what it lacks."""
        size = image.height, image.width
        masks = "segm" in self.kinds
        usable = coco.usable_box(entry, image, masks, crowds=False)
        if not isinstance(usable, str):
            self.notes.use(entry.bbox, image)
        elif usable != coco.CROWD:
            self.notes.drop(usable, image)
        box = None if coco.box_fault(entry.bbox) else [float(value) for value in entry.bbox]
        area = entry.area
        has_area = coco_masks.is_finite(area) and area >= 0
        mask = None
        if masks or not has_area:
            mask = coco_masks.to_rle(entry.segmentation, *size)
        if not has_area:  # COCO's area is the mask's, also where boxes are evaluated
            area = coco_masks.area(mask) if mask else box[2] * box[3] if box else 0
        common = {
            "image_id": self.image_numbers[entry.image_id],
            "category_id": self.class_numbers[entry.category_id],
            "iscrowd": int(entry.iscrowd or 0),
            "area": float(area),
        }
        if box:
            self._append("bbox", {**common, "bbox": box})
        if masks and mask:
            self._append("segm", {**common, "segmentation": mask})
        elif masks and box and (mask := coco_masks.of_box(box, *size)):
            self._append("segm", {**common, "segmentation": mask, "iscrowd": 1})

    def _append(self, kind: str, annotation: dict[str, Any]) -> None:
        """Adds an annotation with an id of its own: COCO's may repeat, or be 0, which means "no
        match".
        """
        annotations = self.annotations[kind]
        annotations.append({**annotation, "id": len(annotations) + 1})

    def report(self, name: str) -> list[str]:
        """Returns lines on what is evaluated, and on what can only be missed or is left out."""
        counts = Counter(a["image_id"] for a in self.annotations["bbox"] if not a["iscrowd"])
        empty = len(self.images) - len(counts)
        images, classes = len(self.images), len(self.names)
        lines = [coco.counts_line(name, images, empty, counts.total(), classes)]
        if many := sum(n > MOST_DETECTIONS for n in counts.values()):
            lines.append(
                f"  ! {counted(many, 'image', ',')} with more than {MOST_DETECTIONS} objects: COCO "
                f"counts the {MOST_DETECTIONS} surest detections of each, so AP cannot reach 100"
            )
        lines += self.notes.lines("  ! {} that no detection can match")
        for kind in self.kinds:
            if all(annotation["iscrowd"] for annotation in self.annotations[kind]):
                lines.append(f"  ! no object has a {KINDS[kind]}: {KINDS[kind]} AP will be -")
        if self.other_names:
            example = coco.shown(self.other_names[0])
            lines.append(
                f"  ! {counted(len(self.other_names), 'class', ',')} of the network not among the "
                f"categories, such as {example}: such detections are left out"
            )
        return lines

    def evaluate(self, results: list[Result]) -> dict[str, Summary]:
        """Returns COCO's figures of `results`: {"bbox": Summary} and, with masks, "segm".

        Args:
            results: of all ranks, with the file's own ids; they stay as they are.
        """
        return {kind: self._summary(self._evaluated(results, kind)) for kind in self.kinds}

    def by_class(self, results: list[Result]) -> dict[str, ClassPrecisions]:
        """Returns each class's figures of "bbox" and, with masks, of "segm"; see `evaluate`."""
        figures = {}
        for kind in self.kinds:
            evaluation = self._evaluated(results, kind).eval
            # IoU, recall, class of precision; IoU, class of recall: of all sizes, 100 detections.
            precision = np.asarray(evaluation["precision"])[..., 0, -1]
            recall = np.asarray(evaluation["recall"])[0, :, 0, -1]
            there = [a["category_id"] - 1 for a in self.annotations[kind] if not a["iscrowd"]]
            objects = np.bincount(there, minlength=len(self.names))
            ap = precision.mean((0, 1))
            figures[kind] = ClassPrecisions(self.names, objects, ap, recall, precision[0].T)
        return figures

    def _evaluated(self, results: list[Result], kind: str) -> Any:
        """Returns the evaluation of faster-coco-eval, summed up."""
        from faster_coco_eval import COCOeval_faster

        truth = self._indexed(self.annotations[kind])
        # Without "bbox" a mask's size class goes by its pixels, with it by its box's area.
        shape = "segmentation" if kind == "segm" else "bbox"
        plain = [
            {
                "image_id": self.image_numbers[result["image_id"]],
                "category_id": self.class_numbers[result["category_id"]],
                "score": result["score"],
                shape: result[shape],
            }
            for result in results
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # it narrates
            detections = truth.loadRes(plain) if plain else self._indexed([])
            evaluation = COCOeval_faster(truth, detections, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _summary(self, evaluation: Any) -> Summary:
        figures = {name: float(v) for name, v in zip(FIGURES, evaluation.stats, strict=False)}
        precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]  # IoU, recall, class
        per_class = {}
        for i, name in enumerate(self.names):
            of_class = precision[:, :, i]
            of_class = of_class[of_class > -1]
            per_class[name] = float(of_class.mean()) if of_class.size else -1.0
        return Summary(figures, {**per_class, **dict.fromkeys(self.other_names, -1.0)})

    def _indexed(self, annotations: Sequence[Mapping[str, Any]]) -> Any:
        """Returns a COCO with copies of these annotations, as its code changes them."""
        from faster_coco_eval import COCO

        indexed = COCO()
        indexed.dataset = {
            "info": {},
            "images": [
                {"id": number, "height": image.height, "width": image.width}
                for number, image in enumerate(self.images, 1)
            ],
            "categories": [{"id": n, "name": name} for n, name in enumerate(self.names, 1)],
            "annotations": [dict(annotation) for annotation in annotations],
        }
        indexed.createIndex()
        return indexed


def evaluate_ranks(
    detections: list[Result], truth: GroundTruth, context: Context
) -> tuple[list[Result] | None, dict[str, Summary]]:
    """COCO's figures of all ranks' detections, on every rank; the detections on rank 0 alone."""
    results = gather(detections, context)
    return results, share(None if results is None else truth.evaluate(results), context)

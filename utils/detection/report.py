"""Makes the lines of a detection run (network, recipe, COCO's figures), and its picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.data.decoding import BrokenImageError
from utils.detection import coco_masks
from utils.detection.coco_dataset import CocoDataset, load_split
from utils.detection.coco_evaluation import FIGURES, Result, Summary
from utils.detection.coco_files import Place
from utils.detection.drawing import png, side_by_side
from utils.detection.outcome import KINDS
from utils.recipes.detection import DetectionRecipe
from utils.system.files import write_atomically

PICTURED = 8  # images in a picture


def network_line(network: nn.Module) -> str:
    """Returns one line: detector, backbone, parameters, kernel sizes, what trains."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    ksize = f"ksize {','.join(map(str, network.ksize))}" if network.ksize else "no ECA"
    legacy = ", mmdetection v1's geometry" if network.model_kwargs["legacy"] else ""
    return (
        f"network: {network.arch} on {network.backbone_arch}, {ksize}, {trained:,} trained "
        f"parameters, norm {network.model_kwargs['norm']}{legacy}"
    )


def recipe_line(recipe: DetectionRecipe, auto: bool) -> str:
    """Returns the numbers of training; `auto` says that the learning rate was scaled."""
    scaled = " (auto: 0.01 for 8 images)" if auto else ""
    decays = ", ".join(map(str, recipe.lr_steps))
    momentum = f", momentum {recipe.momentum:g}" if recipe.optimizer == "sgd" else ""
    return (
        f"recipe: {recipe.epochs} epochs, batch {recipe.batch_size}, {recipe.optimizer} lr "
        f"{recipe.lr:g}{scaled} times {recipe.lr_decay:g} after epochs {decays}, warm-up "
        f"{recipe.warmup_steps} steps{momentum}, weight decay {recipe.weight_decay:g}, clip "
        f"{recipe.clip:g}, sides {recipe.min_size} to {recipe.max_size}"
    )


def summary_lines(summaries: dict[str, Summary]) -> list[str]:
    """Returns COCO's figures and every class's AP, in %; "-" where nothing was to be found."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}" if value >= 0 else "-"

    lines = ["       " + "".join(f"{name:>7}" for name in FIGURES)]
    for kind, summary in summaries.items():
        values = "".join(f"{percent(value):>7}" for value in summary.figures.values())
        lines.append(f"{KINDS[kind]:<7}{values}")
    names = list(next(iter(summaries.values())).per_class)
    width = max(map(len, names))
    heads = "".join(f"{KINDS[kind] + ' AP':>9}" for kind in summaries)
    lines.append(f"{'class':<{width}}{heads}")
    for name in names:
        values = "".join(f"{percent(s.per_class[name]):>9}" for s in summaries.values())
        lines.append(f"{name:<{width}}{values}")
    return lines


def best_lines(best: dict[str, Any]) -> list[str]:
    """Returns `summary_lines` of `RunState.best`, under the epoch's number."""
    if "summaries" not in best:  # of a run that an earlier version began
        return []
    summaries = {kind: Summary(**fields) for kind, fields in best["summaries"].items()}
    return [f"epoch {best['epoch'] + 1}, the best:", *summary_lines(summaries)]


def write_picture(
    path: Path, place: Place, masks: bool, results: Sequence[Result], count: int = PICTURED
) -> None:
    """Draws the first `count` images of a data set, ground truth left and detections right.

    Args:
        place: of the data set.
        masks: whether they are drawn, too.
        results: in COCO's format, of these images among others.
    """
    split = load_split(place, masks, drop_crowds=False)
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

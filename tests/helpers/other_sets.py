"""Sets of images in the forms of ImageNet's relatives, and their figures by loops in float64."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

OUTPUTS = 12  # more than ten: as strings, 10 and 11 come before 2
WNIDS = [f"n{1000 * k + 7:08}" for k in range(OUTPUTS)]
SHUFFLED = [WNIDS[(5 * k + 3) % OUTPUTS] for k in range(OUTPUTS)]
SIZE = ("--img-size", 32, "--crop-pct", 1, "-j", 0, "-b", 7)
FIGURES = re.compile(r"(\d+) images  top-1 ([\d.]+) %  (?:top-5 ([\d.]+) %  )?loss ([\d.]+)")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def write_images(root: Path, folders: list[str], each: int = 3, name: str = "{}.png") -> Path:
    """root/FOLDER/NAME: images of 32 pixels, which evaluation at that size leaves as they are."""
    chance, count = np.random.default_rng(1), 0
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for _ in range(each):
            count += 1
            pixels = chance.integers(0, 256, (4, 4, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(root / folder / name.format(count))
    return root


def logits_of(network, root: Path) -> tuple[np.ndarray, list[Path]]:
    """Logits (n, 12) in float64 of every image below `root`, and their files."""
    import copy

    files = sorted(root.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file), np.float64) / 255 for file in files])
    batch = torch.from_numpy(((pixels - MEAN) / STD).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return copy.deepcopy(network).double()(batch).numpy(), files


def reference(logits: np.ndarray, labels: list[int], compared: list[int]) -> list[float]:
    """top-1, top-5 and loss, by a loop, over the outputs `compared`."""
    first = fifth = loss = 0.0
    for row, label in zip(logits, labels, strict=True):
        scores = {output: row[output] for output in compared}
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        first += order[0] == label
        fifth += label in order[:5]
        top = max(scores.values())
        loss += np.log(sum(np.exp(s - top) for s in scores.values())) + top - scores[label]
    n = len(labels)
    return [100 * first / n, 100 * fifth / n, loss / n]


def measured(lines: list[str]) -> list[float]:
    found = [FIGURES.match(line) for line in lines]
    (found,) = filter(None, found)
    return [float(text or 100) for text in found.groups()[1:]]  # of five classes, all are right


def evaluated(call, ckpt: Path, *arguments) -> list[str]:
    code, out, err = call("-e", "--resume", ckpt, *SIZE, *arguments)
    assert code == 0, err
    return out


def refused(call, *arguments) -> str:
    code, _, err = call("-e", *SIZE, *arguments)
    assert code != 0
    assert len(err) == 1, err
    return err[0]

"""Counts predictions that are among the labels that ImageNet's validation images were given anew.

"Are we done with ImageNet?" (Beyer et al. 2020) gave each of the 50,000 images all labels that fit:
https://github.com/google-research/reassessed-imagenet. A prediction is right when it is one of
them; images without a label do not count.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.data.class_order import WNID
from utils.data.image_folder import ImageFolder
from utils.system import distributed
from utils.system.errors import UserError
from utils.system.text import printable

NUMBER = re.compile(rb"ILSVRC2012_val_(\d{8})(?!\d)")  # of an image, in its file's name
LARGEST = 1 << 26  # bytes; the published file has 0.4 MB


@dataclass(frozen=True)
class RealLabels:
    """Holds the labels of each image.

    Args:
        sets: (n, most) int64 outputs of the network, filled up with -1.
    """

    sets: np.ndarray

    @property
    def counted(self) -> int:
        """Returns the number of images with a label."""
        return int((self.sets >= 0).any(1).sum())


class RealMeter:
    """Sums, on the device, the predictions that are among an image's labels.

    Args:
        real: the labels anew of each image.
        labels: (n,) int64 the label that each image's folder says.
    """

    def __init__(self, real: RealLabels, labels: np.ndarray, device: torch.device):
        self.sets = torch.from_numpy(real.sets).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.sums = torch.zeros(2, dtype=torch.int64, device=device)  # right, counted

    @torch.no_grad()
    def count(self, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Adds a batch, and returns the labels (N,) of its folders.

        Args:
            logits: (N, C). A row that is not finite is never right.
            numbers: (N,) which of the n images each row is of.
        """
        sets = self.sets[numbers]
        hits = (logits.argmax(1)[:, None] == sets).any(1) & logits.isfinite().all(1)
        self.sums += torch.stack([hits.sum(), (sets >= 0).any(1).sum()])
        return self.labels[numbers]

    def figures(self) -> dict[str, float]:
        """Returns {"real_top1" in %, "real_images"} over all ranks. Call it on every rank."""
        right, counted = distributed.all_reduce(self.sums.clone()).tolist()
        return {"real_top1": 100 * right / counted, "real_images": counted}


def read(file: str, images: ImageFolder, names: Sequence[str]) -> RealLabels:
    """Reads the published file, and finds each image's labels by the number in its file's name.

    Args:
        file: real.json: a list of lists of class numbers, the first that of image 1. A class's
            number is its place among the sorted WordNet numbers.
        images: ImageNet's validation images, or some of them.
        names: of the network's outputs: WordNet numbers, in any order.

    Raises:
        UserError: another file, other images or other classes.
    """
    where = f"--real-labels {printable(file)}"
    if not all(WNID.fullmatch(name) for name in names):
        raise UserError(
            f"{where}: its class numbers count ImageNet's sorted WordNet numbers (n01440764, …), "
            "and the network's classes have other names; --class-names FILE gives them to weights "
            "without names"
        )
    table = _table(file, where, len(names))
    numbers = _image_numbers(images, where)
    if (most := max(numbers)) > len(table):
        raise UserError(
            f"{where}: has labels for {len(table):,} images, and the data has image {most:,}; give "
            "the whole file"
        )
    place = {name: output for output, name in enumerate(names)}
    outputs = [place[name] for name in sorted(names)]
    chosen = [[outputs[label] for label in table[number - 1]] for number in numbers]
    sets = np.full((len(chosen), max(1, *map(len, chosen))), -1, np.int64)
    for row, labels in zip(sets, chosen, strict=True):
        row[: len(labels)] = labels
    real = RealLabels(sets)
    if not real.counted:
        raise UserError(f"{where}: none of these images has a label; give the whole file")
    return real


def _table(file: str, where: str, classes: int) -> list[list[int]]:
    """Returns the lists of class numbers in a file, each number below `classes`."""
    wanted = f"{where}: not a JSON list of lists of class numbers; give real.json as published"
    try:
        if os.path.getsize(file) > LARGEST:
            raise UserError(wanted)
        with open(file, encoding="utf-8") as source:
            table = json.load(source)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give the file real.json") from None
    except (ValueError, RecursionError):
        raise UserError(wanted) from None
    if not isinstance(table, list) or not all(isinstance(labels, list) for labels in table):
        raise UserError(wanted)
    for number, labels in enumerate(table, 1):
        for label in labels:
            if type(label) is not int:
                raise UserError(wanted)
            if not 0 <= label < classes:
                raise UserError(
                    f"{where}: image {number} has class {label}, and the network has 0 to "
                    f"{classes - 1}; give a network of ImageNet's classes"
                )
    return table


def _image_numbers(images: ImageFolder, where: str) -> list[int]:
    """Returns the number of each image; raises a UserError where a name has none, or one twice."""
    numbers: list[int] = []
    for path in images.paths.tolist():
        found = NUMBER.match(os.path.basename(path))
        if found is None or not int(found[1]):
            raise UserError(
                f"{where}: {printable(path)} is not named ILSVRC2012_val_ and a number, as "
                "ImageNet's validation images are; give these as DATA"
            )
        numbers.append(int(found[1]))
    counts = np.bincount(numbers)
    if (counts > 1).any():
        raise UserError(
            f"{where}: the data has image {int(counts.argmax())} more than once; give each once"
        )
    return numbers

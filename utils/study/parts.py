"""Cuts a validation part from a study's training images, class by class."""

import os
import shutil
from pathlib import Path

import numpy as np

from utils.data import image_folder
from utils.data.image_folder import ImageFolder
from utils.system.errors import UserError


def write_parts(
    root: Path, folder: Path, train_per_class: int | None, validation_per_class: int, seed: int
) -> None:
    """Makes folder/train and folder/val of the images of root/train; root/val is not touched.

    The images are hard links where the file system has them.

    Args:
        folder: empty.
        train_per_class: images of each class in folder/train; None for all that are left.
        validation_per_class: images of each class in folder/val.
        seed: of the draw; folder/val does not depend on `train_per_class`.

    Raises:
        UserError: a class has too few images, or root/train cannot be read.
    """
    images = image_folder.scan(str(root / "train"))
    chance = np.random.default_rng(seed)
    for label, name in enumerate(images.classes):
        drawn = chance.permutation(np.flatnonzero(images.labels == label))
        end = None if train_per_class is None else validation_per_class + train_per_class
        needed = validation_per_class + (train_per_class or 1)
        if len(drawn) < needed:
            raise UserError(
                f"{images.where}: class {name} has {len(drawn)} images, and the plan takes "
                f"{needed}; plan fewer"
            )
        _link(images, drawn[:validation_per_class], folder / "val" / name)
        _link(images, drawn[validation_per_class:end], folder / "train" / name)


def _link(images: ImageFolder, indices: np.ndarray, place: Path) -> None:
    place.mkdir(parents=True)
    for index in sorted(indices.tolist()):
        source = os.fsdecode(images.path(index))
        target = place / f"{index:07d}{Path(source).suffix}"
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)

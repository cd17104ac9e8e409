"""Opens DATA as the scripts take it: train/ and val/ of class folders or tar shards, or a URL."""

import os
from collections.abc import Sequence

from utils.data import image_folder, remote_files, shard_folder
from utils.data.image_folder import ImageFolder


def open_images(root: str, classes: Sequence[str] | None = None) -> ImageFolder:
    """Opens the images below one folder: class folders or tar shards.

    Args:
        classes: the names in label order; by default those found.

    Raises:
        UserError: see `image_folder.scan` and `shards.scan`.
    """
    return (shard_folder if shard_folder.in_shards(root) else image_folder).scan(root, classes)


def open_split(
    data: str, classes: Sequence[str] | None = None, with_train: bool = True
) -> tuple[ImageFolder | None, ImageFolder]:
    """Opens the images of data/train and data/val, labelled by the same class names.

    Args:
        classes: the names in label order; by default those of data/train.
        with_train: False looks at data/val alone.

    Raises:
        UserError: see `open_images`; also when val has a class that train has not.
    """
    if not remote_files.is_remote(str(data)) and not os.path.isdir(data):
        image_folder.list_classes(data)  # says so, with the nearest name
    train = open_images(os.path.join(data, "train"), classes) if with_train else None
    return train, open_images(os.path.join(data, "val"), train.classes if train else classes)

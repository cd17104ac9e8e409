"""The image files of a COCO split: all there, and none outside of its folder unless asked for."""

import os
from collections.abc import Sequence

from utils.detection.coco_files import Place, shown
from utils.system.errors import UserError


def missing_images(place: Place, names: Sequence[str]) -> list[str]:
    """Those of the file names that are no file in the folder of images."""
    return [name for name in names if not os.path.isfile(os.path.join(place.images, name))]


def refuse_missing(place: Place, names: Sequence[str]) -> None:
    """Holds the file names of a split against the folder of images.

    Raises:
        UserError: some are missing; it names one.
    """
    missing = missing_images(place, names)
    if not missing:
        _refuse_outside(place, names)
        return
    name = missing[0]
    if "://" in name:
        remedy = "download the images, and write their names in the place of addresses"
    elif "\\" in name:
        remedy = "file_name has \\ between folders: write / there"
    else:
        remedy = f"name the folder with --{place.part}-images"
    raise UserError(
        f"{place.images}: {len(missing):,} of {len(names):,} images are missing, such as "
        f"{shown(name)}; {remedy}"
    )


def _refuse_outside(place: Place, names: Sequence[str]) -> None:
    """Refuses images to which a link leads that leaves their folder: a stranger may have made it.

    The folder itself may be a link: that is the user's own arrangement.
    """
    if place.anywhere:
        return
    folders: dict[str, bool] = {"": False}  # folder in the folder of images -> a link is on its way

    def linked(folder: str) -> bool:
        if folder not in folders:
            path = os.path.join(place.images, folder)
            folders[folder] = os.path.islink(path) or linked(os.path.dirname(folder))
        return folders[folder]

    home = os.path.realpath(place.images) + os.sep
    for name in names:
        path = os.path.join(place.images, name)
        if os.path.islink(path) or linked(os.path.dirname(name)):
            target = os.path.realpath(path)
            if not target.startswith(home):
                raise UserError(
                    f"{place.images}: {shown(name)} is a link to {shown(target)}, outside of that "
                    "folder; give --images-anywhere if it is yours"
                )

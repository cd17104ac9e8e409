"""Matches class folders with the outputs of a network, and never guesses.

Folders go by name. Two kinds of data do not have the names of the network's classes: ImageNet-V2,
whose folders are the numbers of the outputs, and any data for weights that hold no names.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.data import image_folder, shards
from utils.data.image_folder import OTHER_NAMES
from utils.system.errors import UserError
from utils.system.text import printable

WNID = re.compile(r"n\d{8}")  # WordNet's number of a class of ImageNet


class Order(NamedTuple):
    """Says in which order class folders belong to a network's outputs."""

    # names of class folders, the one of output 0 first; a folder may be missing
    folders: tuple[str, ...]
    names: tuple[str, ...]  # of the outputs, for people
    # lines on how they were matched; empty where folders go by the network's own names
    notes: tuple[str, ...] = ()


def evaluation_folder(data: str) -> str:
    """Returns the folder of the images that a network is evaluated on.

    It is data/val; or `data` itself where it has neither that nor a folder that training data has.

    Args:
        data: a folder, or the URL of one with val/ in it.
    """
    inner = os.path.join(data, "val")
    if shards.is_remote(data) or os.path.isdir(inner) or not os.path.isdir(data):
        return inner
    parts = {"train", "val", *OTHER_NAMES["train"], *OTHER_NAMES["val"]}
    with os.scandir(data) as entries:
        inside = [entry.name for entry in entries if entry.is_dir()]
    folders = [name for name in inside if not image_folder.is_passed_over(name)]
    if any(name.lower() in parts for name in folders):
        return inner  # whose absence is then said, with the folder that was meant
    return data if folders or shards.in_shards(data) else inner


def match(root: str, names: Sequence[str] | None, outputs: int, source: str) -> Order:
    """Matches the class folders below `root` with a network's outputs.

    Args:
        root: the folder that holds class folders or tar shards.
        names: of the outputs, in their order; None where nobody knows them.
        source: the checkpoint, for messages.

    Raises:
        UserError: without names, the folders are not one for each output, or their order is not
            known. Folders that `names` does not have are for the opening of the data to refuse.
    """
    folders, are_names = _folders(root)
    numbers = tuple(str(number) for number in range(outputs))
    by_name = names is not None and (not are_names or set(folders) <= set(names))
    if set(folders) == set(numbers) and not by_name:  # as in ImageNet-V2
        note = f"the class folders are numbers, 0 to {outputs - 1}: taken as the outputs' numbers"
        if names is not None:
            note += f" (0 is {printable(names[0])}, {outputs - 1} is {printable(names[-1])})"
        return Order(numbers, tuple(names or numbers), (note,))
    if names is not None:
        return Order(tuple(names), tuple(names))
    if len(folders) != outputs:
        raise UserError(
            f"{printable(root)} has {len(folders)} class folders, {source} {outputs} classes "
            "without names: the numbers must agree, or --class-names must say what the outputs are"
        )
    if all(name.isdecimal() for name in folders) and folders != sorted(folders, key=int):
        raise UserError(
            f"{printable(root)}: the class folders are numbers, but not 0 to {outputs - 1}, and "
            f"{source} has no class names: give the folder of each output with --class-names FILE"
        )
    first, last = printable(folders[0]), printable(folders[-1])
    note = f"the weights have no class names: {first} is taken as output 0, {last} as the last one"
    return Order(tuple(folders), tuple(folders), (note,))


def _folders(root: str) -> tuple[list[str], bool]:
    """Returns the names of classes below `root`, and whether they are more than shards' numbers."""
    if not shards.in_shards(root):
        return image_folder.list_classes(root), True
    folder = shards.scan(root)
    return list(folder.classes), not folder.notes


def read_names(source: str, outputs: int) -> tuple[str, ...]:
    """Reads the names of a network's outputs, in their order.

    Args:
        source: a text file with one name a line (where each line begins with a WordNet number, as
            in ImageNet's LOC_synset_mapping.txt, that is the name); or a folder of class folders,
            or with such a val/, whose sorted names are taken.

    Raises:
        UserError: it cannot be read, has another number of names, or one twice.
    """
    where = f"--class-names {printable(source)}"
    if os.path.isdir(source):
        names = image_folder.list_classes(evaluation_folder(source))
    else:
        names = _lines(source, where)
    if len(names) != outputs:
        raise UserError(
            f"{where}: {len(names)} names for {outputs} outputs; give one a line, in the order of "
            "the outputs, or the folder of the training's classes"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: {printable(twice[0])} is there twice; give each name once")
    return tuple(names)


def _lines(file: str, where: str) -> list[str]:
    """Returns the names in a text file."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{where}: {reason}; give a text file, one name a line") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = [re.split(r"[\s,]", line, maxsplit=1)[0] for line in lines]
    return first if all(WNID.fullmatch(word) for word in first) else lines

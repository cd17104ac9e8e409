"""Refuses checkpoints that claim far more than their file holds, before memory is taken for it.

A few bytes can stand for terabytes: a tensor that repeats one number, zeros that a zip packs, lists
that hold each other. `utils.runs.checkpoint.load` asks before it reads a file, and after.
"""

import mmap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.runs import schema
from utils.system.errors import UserError
from utils.system.text import printable

MORE = 4  # times the file's size: what shared tensors and an averaged copy may come to
SLACK = 2**20  # bytes: small files may repeat small tensors
VALUES = 3_000_000  # counted where they stand: a list that is held twice counts twice
SAVE_AGAIN = "save it again with torch.save in the program that made it"
HOLDERS = (torch.Tensor, Mapping, list, tuple, set)
BYTEARRAY = (
    b"cbuiltins\nbytearray\n"  # the one name torch lets a pickle call with a size of its own
)


def refuse_packed(path: Path) -> None:
    """Refuses a file whose parts grow when they are read. Nothing of it is unpacked.

    Raises:
        UserError: one line with both sizes; or the pickle asks for a bytearray.
        zipfile.BadZipFile: it is a damaged zip.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # A stored part that claims more than is there is damaged, which its checksum tells.
            claimed = sum(
                part.file_size
                for part in archive.infolist()
                if part.compress_type != zipfile.ZIP_STORED or part.file_size == part.compress_size
            )
            if claimed > MORE * size + SLACK:
                raise UserError(
                    f"{path}: {claimed / 1e6:,.1f} MB packed into {size / 1e6:,.1f} MB, which "
                    f"torch never does; {SAVE_AGAIN}"
                )
            for part in archive.infolist():
                if part.filename.endswith(".pkl") and BYTEARRAY in archive.read(part):
                    raise _refused_bytearray(path)
    elif size:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            if view.find(BYTEARRAY) >= 0:
                raise _refused_bytearray(path)


def refuse_claims(contents: Any, path: Path) -> None:
    """Refuses what was read where its tensors or lists stand for more than the file can hold.

    Raises:
        UserError: one line; tensors larger than the file, or too many values.
    """
    size = path.stat().st_size
    room = MORE * size + SLACK
    count = 0
    waiting: list[tuple[Any, Any]] = [("", contents)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            room -= value.numel() * value.element_size()
            if room < 0:
                raise UserError(
                    f"{path}: its tensors would fill more than {MORE} times the file's "
                    f"{size / 1e6:,.1f} MB ({printable(str(name))} alone "
                    f"{value.numel() * value.element_size() / 1e6:,.1f} MB); save them whole, with "
                    ".contiguous()"
                )
            continue
        count += len(value)
        if count > VALUES:
            raise UserError(f"{path}: more than {VALUES:,} values; give a file of weights alone")
        named = value.items() if isinstance(value, Mapping) else ((name, part) for part in value)
        waiting += [(key, part) for key, part in named if isinstance(part, HOLDERS)]


def refuse_other_tensors(contents: Mapping[Any, Any], path: Path) -> None:
    """Refuses weights without numbers (on meta), sparse or quantised ones, which fit no network.

    Raises:
        UserError: one line with the tensor's name.
    """
    inner = [part for part in contents.values() if isinstance(part, Mapping)]
    for place in (contents, *inner):
        for name, value in place.items():
            if isinstance(value, torch.Tensor) and schema.tensor(value) is not None:
                raise UserError(
                    f"{path}: {printable(str(name))} is not {schema.tensor(value)} (it is on meta, "
                    "sparse, complex or quantised); save dense weights"
                )


def _refused_bytearray(path: Path) -> UserError:
    return UserError(
        f"{path}: asks for a bytearray of any size, which no weights need; {SAVE_AGAIN}"
    )

"""Reads small files that a user has written: text, and JSON without a name twice."""

import json
from pathlib import Path
from typing import Any

from utils.system.errors import UserError
from utils.system.text import printable

LARGEST = 16_000_000  # bytes; what a person writes is a thousandth of it


def read_text(path: str | Path, wanted: str) -> str:
    """Returns the text of a file in UTF-8, with or without a byte-order mark.

    Args:
        wanted: what the user is to give instead, for the message.

    Raises:
        UserError: no such file, no text, or too large.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"{printable(path)}: {why}; give {wanted}") from None
    if len(data) > LARGEST:
        raise UserError(f"{printable(path)}: more than {LARGEST:,} bytes; give {wanted}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{printable(path)}: no text in UTF-8; give {wanted}") from None


def read_json(path: str | Path, wanted: str) -> Any:
    """Returns what a JSON file holds; `wanted` as in `read_text`.

    Raises:
        UserError: as `read_text`; no JSON; or an object that names one thing twice.
    """
    text = read_text(path, wanted)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        why = "nested too deep"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{printable(path)}: no usable JSON ({printable(why)}); give {wanted}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found

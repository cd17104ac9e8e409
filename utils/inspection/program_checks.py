"""Refuses a .pt2 file that could run code of its own when it is opened.

`torch.export.load` trusts its file: weights can be pickles, sizes are expressions and guards are
Python that is evaluated, and an operation is any function of torch by its name. A file of export.py
needs none of that freedom: plain bytes, sums and products of sizes, and tensor operations.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.system.errors import UserError

# Tensor operations, and arithmetic on sizes.
OPERATION = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(max|min|not|int|float)"
)
WORDS = frozenset(
    [
        "Add",
        "And",
        "Eq",
        "FloorDiv",
        "Ge",
        "Gt",
        "Integer",
        "L",
        "Le",
        "Lt",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Ne",
        "Not",
        "Or",
        "Pow",
        "PythonMod",
        "Symbol",
        "CleanDiv",
        "False",
        "True",
        "and",
        "images",
        "integer",
        "max",
        "min",
        "not",
        "or",
        "positive",
        "size",
        "x",
        "zuf",
        "oo",
        "int_oo",
    ]
)
WORD = re.compile(r"[^\W\d]\w*")
SIZE_SYMBOL = re.compile(r"[su]\d+")
# Besides these, an archive holds weights and constants as plain bytes.
FILES = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/\w+|models/model\.json"
    r"|data/(weights/(weight_\d+|model_weights_config\.json)"
    r"|constants/(tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|extra/metadata\.json)"
)


def refuse_code(path: Path) -> None:
    """Looks through a .pt2 file without loading it.

    Raises:
        UserError: it is no such file, or holds what could run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            reason = _reason(archive)
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, RecursionError):
        raise UserError(f"{path}: damaged, or not a .pt2 file of export.py") from None
    if reason:
        raise UserError(
            f"{path}: holds {reason}, which a stranger's file could use to run code; refused"
        )


def _reason(archive: zipfile.ZipFile) -> str | None:
    names = archive.namelist()
    if len(set(names)) != len(names):
        return "two files of one name"
    for name in names:
        if not FILES.fullmatch(name):
            return f"a file {name[:60]!r}"
        if name.endswith("_config.json"):
            entries = json.loads(archive.read(name))["config"]
            if any(entry.get("use_pickle") is not False for entry in entries.values()):
                return "pickled objects"
        elif name.endswith("sample_inputs/model.pt"):
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except Exception:  # the safe loader refuses it: what follows would not
                return "example inputs that are no plain tensors"
        elif name.endswith("models/model.json"):
            for key, text in _strings(json.loads(archive.read(name))):
                if key == "target" and not OPERATION.fullmatch(text):
                    return f"the operation {text[:60]!r}"
                if key in ("expr_str", "guards_code") and not _is_arithmetic(text):
                    return f"the expression {text[:60]!r}"
    return None


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every string of a JSON value, with the key that it or its list stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner, part in value.items():
            yield from _strings(part, inner)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part, key)


def _is_arithmetic(text: str) -> bool:
    """Tells whether an expression holds nothing but numbers, sizes, and functions of these."""
    return all(word in WORDS or SIZE_SYMBOL.fullmatch(word) for word in WORD.findall(text))

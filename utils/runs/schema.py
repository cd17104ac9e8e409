"""Checks the type and range of each field of our checkpoints, for `utils.runs.checkpoint.load`.

A stranger's file, or one that a tool of theirs wrote, may hold anything: without this check a wrong
type ends far from here in a traceback.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.system.errors import UserError
from utils.system.text import printable

# A rule returns what is wanted where a value is not that, with the place inside the value; or None.
Rule = Callable[[Any], str | None]
NAME = "a text"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else NAME


def whole(low: int = 0, high: int = 2**63 - 1) -> Rule:
    """Returns the rule of a whole number from `low` to `high`."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a whole number from {low} to {high}"

    return rule


def real(low: float = -math.inf, high: float = math.inf) -> Rule:
    """Returns the rule of a number from `low` to `high`; without bounds it may be infinite."""

    def rule(value: Any) -> str | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (math.isinf(low) or low <= value <= high):
            return None
        return "a number" if math.isinf(low) else f"a number from {low:g} to {high:g}"

    return rule


def plain(value: Any, depth: int = 8) -> str | None:
    """Returns a fault where a value is not built of None, bool, number, text, list and mapping
    alone.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return None
    if depth and isinstance(value, list | tuple):
        return next((wrong for part in value if (wrong := plain(part, depth - 1))), None)
    if depth and isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            return "names as keys"
        return next((wrong for part in value.values() if (wrong := plain(part, depth - 1))), None)
    return "plain values"


def tensor(value: Any) -> str | None:
    """Returns a fault where a value is no dense tensor of real numbers."""
    fits = (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_complex()
        and not value.is_quantized
    )
    return None if fits else "a dense tensor of real numbers"


def scalar(value: Any) -> str | None:
    """Returns a fault where a value is no dense tensor of one number."""
    fits = tensor(value) is None and value.numel() == 1
    return None if fits else "a dense tensor of one number"


def table(value: Any) -> str | None:
    """Returns a fault where a value is no dense tensor with two axes."""
    fits = tensor(value) is None and value.ndim == 2
    return None if fits else "a dense tensor with two axes"


def either(*rules: Rule) -> Rule:
    """Returns the rule of a value that fits one of several."""

    def rule(value: Any) -> str | None:
        wrongs = [wrong for one in rules if (wrong := one(value)) is not None]
        return " or ".join(wrongs) if len(wrongs) == len(rules) else None

    return rule


def nothing(value: Any) -> str | None:
    return None if value is None else "None"


def list_of(inner: Rule) -> Rule:
    """Returns the rule of a list or tuple whose elements fit `inner`."""

    def rule(value: Any) -> str | None:
        if not isinstance(value, list | tuple):
            return "a list"
        return next((f"a list with {wrong} in it" for v in value if (wrong := inner(v))), None)

    return rule


def mapping_of(inner: Rule, key: Rule = text) -> Rule:
    """Returns the rule of a mapping from `key` to `inner`."""

    def rule(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return "a mapping"
        for name, part in value.items():
            if wrong := key(name):
                return f"a mapping with {wrong} as each key"
            if wrong := inner(part):
                return f"{wrong} as {printable(name)}"
        return None

    return rule


def fields(needed: Mapping[str, Rule], others: Rule = plain) -> Rule:
    """Returns the rule of a mapping whose known fields fit theirs and whose others fit `others`."""

    def rule(value: Any) -> str | None:
        if wrong := mapping_of(lambda _: None)(value):
            return wrong
        for name, part in value.items():
            if wrong := needed.get(name, others)(part):
                return f"{wrong} as {printable(name)}"
        return None

    return rule


TENSORS = mapping_of(tensor)
ROW = mapping_of(real())
SCHEMA: Mapping[str, Rule] = {
    "format": whole(),
    "arch": text,
    "backbone": text,
    "attention": either(nothing, text),
    "ksize": either(nothing, list_of(whole(1))),
    "num_classes": whole(1, 2**31),
    "model_kwargs": fields({}),
    "parameters": whole(),
    "classes": either(nothing, list_of(text)),
    "category_ids": either(nothing, list_of(whole(-(2**63)))),
    "img_size": either(nothing, whole(1, 2**15)),
    "crop_pct": either(nothing, real(1e-6, 1)),
    "recipe": fields({}),
    "args": fields({}),
    "seed": whole(),
    "train_digest": text,
    "class_weights": either(nothing, list_of(real(0, 1e308))),
    "pretrained": either(nothing, text),
    "train_images": whole(),
    "environment": fields({}),
    "state_dict": TENSORS,
    "raw_state_dict": TENSORS,
    "averaged_steps": whole(),
    "optimizer": fields(
        {
            "state": mapping_of(mapping_of(either(tensor, plain)), whole()),
            "param_groups": list_of(
                fields(
                    {
                        "lr": real(0, 1e308),
                        "params": list_of(whole()),
                        "step": either(scalar, whole()),
                    }
                )
            ),
        }
    ),
    "scaler": mapping_of(real()),
    "progress": fields(
        {
            "epoch": whole(),
            "step": whole(),
            "sums": table,
            "best": fields({"epoch": whole(), "summaries": fields({})}, real()),
            "broken": list_of(whole()),
        }
    ),
    "history": list_of(fields({"epoch": whole()}, real())),
}
OF_PROGRESS = ("epoch", "step", "sums", "best", "broken")  # a run that goes on needs them all


def check(contents: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a checkpoint of ours in which a field is not of its type, or out of range.

    Fields that are not known here, as of a later version, are not looked at.

    Raises:
        UserError: one line with the file and the field.
    """
    for name, rule in SCHEMA.items():
        if name in contents and (wrong := rule(contents[name])):
            raise _refused(path, name, f"{wrong} is wanted there")


def check_run(contents: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a run that lacks what training needs to go on, after `check`.

    Raises:
        UserError: one line with the file and the field.
    """
    progress = contents["progress"]
    if lacking := [name for name in OF_PROGRESS if name not in progress]:
        raise _refused(path, "progress", f"it lacks {lacking[0]}")
    optimizer = contents["optimizer"]
    if not {"state", "param_groups"} <= optimizer.keys():
        raise _refused(path, "optimizer", "it lacks state or param_groups")
    if any("lr" not in group for group in optimizer["param_groups"]):
        raise _refused(path, "optimizer", "a group lacks lr")
    rows = [*contents["history"], *([progress["best"]] if progress["best"] else [])]
    if any("epoch" not in row for row in rows):
        raise _refused(path, "history", "a row lacks epoch")
    if progress["step"] and "train_images" not in contents:  # compared inside an epoch
        raise _refused(path, "train_images", "it is missing")


def _refused(path: str | Path, name: str, what: str) -> UserError:
    return UserError(
        f"{printable(path)}: the field {name} cannot be used ({what}); give a checkpoint as the "
        "scripts write it"
    )

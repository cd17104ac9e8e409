"""Reads the plan of a study: a JSON file, written before the first run and not changed after it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.system.errors import UserError
from utils.system.text import did_you_mean, printable

NONE = "none"  # the variant that the others are compared with
# Name of a variant: the network's name with {} for the plain one's, and what main.py is told
# besides; K3 stands for k = 3 in every stage.
K3 = "K3"
VARIANTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    NONE: ("{}", ()),
    "SE": ("se_{}", ()),
    "ECA-NS k=3": ("eca_{}", ("--attention", "eca_ns", "--ksize", K3)),
    "ECA k=3": ("eca_{}", ("--ksize", K3)),
    "ECA adaptive": ("eca_{}", ("--ksize", "adaptive")),
    "ECA published": ("eca_{}", ()),
    "ECA identity start": ("eca_{}", ("--identity-start",)),  # on weights of a plain network
}
STAGES = {"resnet": "3333", "mobilenet": "33"}  # K3 as --ksize takes it
# Flags that the study gives itself, or that would make runs of one plan differ.
OWN = ("-a", "--arch", "--ksize", "--attention", "--lr", "--learning-rate", "--seed", "--output")
OWN += (
    "--resume",
    "-e",
    "--evaluate",
    "--recipe",
    "--identity-start",
    "-j",
    "--workers",
    "--device",
)


@dataclass(frozen=True)
class Runs:
    """Says how one network is trained.

    Args:
        rates: learning rates to choose from, each tried with every variant.
        flags: for main.py.
    """

    rates: tuple[float, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Holds a study. Each field but `digest` stands in the file under the same name.

    Args:
        question: what the study is to answer, in words.
        data: as main.py takes it; its val/ holds the test images.
        train_per_class: training images of each class; None for all that validation leaves.
        validation_per_class: images of each class cut from train/, which choose rate and epoch.
        split_seed: of the cut.
        networks: how each is trained, by the plain network's name.
        variants: names of `VARIANTS`, `NONE` first.
        choosing_seeds: of the runs that choose the rates.
        seeds: of the runs that the test images judge.
        also_compare: pairs of variants, besides each with `NONE`.
        level: of the intervals.
        digest: SHA-256 of the file.
    """

    question: str
    data: str
    train_per_class: int | None
    validation_per_class: int
    split_seed: int
    networks: Mapping[str, Runs]
    variants: tuple[str, ...]
    choosing_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    also_compare: tuple[tuple[str, str], ...]
    level: float
    digest: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Returns the comparisons for each network, as (variant, the one it is compared with)."""
        return [(name, NONE) for name in self.variants[1:]] + list(self.also_compare)


def read_plan(file: Path) -> Plan:
    """Reads a plan.

    Raises:
        UserError: no such file, or it is no plan; names the field.
    """
    try:
        data = file.read_bytes()
        values = json.loads(data)
    except OSError as error:
        raise UserError(f"{printable(file)}: {error.strerror}; give a plan's file") from None
    except ValueError as error:
        raise UserError(f"{printable(file)}: no JSON ({error}); see docs/EVIDENCE.md") from None
    try:
        return _checked(values, hashlib.sha256(data).hexdigest())
    except ValueError as error:
        raise UserError(f"{printable(file)}: {printable(str(error))}") from None


def arch_and_flags(network: str, variant: str) -> tuple[str, list[str]]:
    """Returns main.py's name of a network's variant, and the flags that make it."""
    arch, flags = VARIANTS[variant]
    three = next(k for family, k in STAGES.items() if network.startswith(family))
    return arch.format(network), [three if word == K3 else word for word in flags]


def _checked(values: Any, digest: str) -> Plan:
    names = {f.name for f in fields(Plan)} - {"digest"}
    if not isinstance(values, dict) or values.keys() != names:
        given = values.keys() if isinstance(values, dict) else ()
        wrong = sorted(names ^ set(given))
        raise ValueError(f"a plan has the fields {', '.join(sorted(names))}; wrong: {wrong}")
    plan = Plan(
        question=_of(values, "question", str),
        data=_of(values, "data", str),
        train_per_class=_of(values, "train_per_class", int, None),
        validation_per_class=_of(values, "validation_per_class", int),
        split_seed=_of(values, "split_seed", int),
        networks={name: _runs(name, runs) for name, runs in _of(values, "networks", dict).items()},
        variants=tuple(_of(values, "variants", list)),
        choosing_seeds=_numbers(values, "choosing_seeds"),
        seeds=_numbers(values, "seeds"),
        also_compare=tuple(tuple(pair) for pair in _of(values, "also_compare", list)),
        level=_of(values, "level", float),
        digest=digest,
    )
    if not plan.networks or min(plan.validation_per_class, plan.train_per_class or 1) < 1:
        raise ValueError("networks, train_per_class or validation_per_class is empty")
    if not 0 < plan.level < 1:
        raise ValueError(f"level {plan.level} is not between 0 and 1")
    for name in (*plan.variants, *(name for pair in plan.also_compare for name in pair)):
        if name not in VARIANTS:
            hint = did_you_mean(str(name), VARIANTS) or f"; there is {', '.join(VARIANTS)}"
            raise ValueError(f"no variant {name!r}{hint}")
    if plan.variants[:1] != (NONE,) or len(set(plan.variants)) < max(2, len(plan.variants)):
        raise ValueError(f"variants begin with {NONE!r}, and name at least one other, each once")
    if any(len(pair) != 2 or not {*pair} <= {*plan.variants} for pair in plan.also_compare):
        raise ValueError("also_compare holds pairs of the plan's variants")
    return plan


def _of(values: Mapping[str, Any], name: str, *kinds: type | None) -> Any:
    value = values[name]
    if value is None and None in kinds:
        return value
    if isinstance(value, tuple(kind for kind in kinds if kind)) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} is {value!r}")


def _numbers(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    numbers = _of(values, name, list)
    if not numbers or len(set(map(str, numbers))) < len(numbers):
        raise ValueError(f"{name} is {numbers}: give seeds, each once")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{name} is {numbers}: seeds are whole numbers from 0")
    return tuple(numbers)


def _runs(name: str, values: Any) -> Runs:
    if not any(name.startswith(family) for family in STAGES):
        raise ValueError(f"network {name!r}: give a plain one, such as resnet18 or mobilenetv2")
    if not isinstance(values, dict) or values.keys() != {"rates", "flags"}:
        raise ValueError(f"network {name}: give its rates and flags")
    rates, flags = values["rates"], values["flags"]
    if not isinstance(rates, list) or not rates or len(set(rates)) < len(rates):
        raise ValueError(f"network {name}: rates is {rates!r}")
    if not all(isinstance(rate, float) and 0 < rate < float("inf") for rate in rates):
        raise ValueError(f"network {name}: rates are numbers above 0, with a decimal point")
    if not isinstance(flags, list) or not all(isinstance(word, str) for word in flags):
        raise ValueError(f"network {name}: flags is a list of words")
    if taken := [word for word in flags if word.split("=")[0] in OWN]:
        raise ValueError(f"network {name}: the study itself gives {taken[0]}: leave it out")
    return Runs(tuple(sorted(rates)), tuple(flags))

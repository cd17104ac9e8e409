"""A small plan, and the results of runs that never took place."""

import copy
import json
from pathlib import Path
from typing import Any

from utils.inspection.study import Plan, RunResult, read_plan

SMALL = {
    "question": "Does it work?",
    "data": "DATA",
    "train_per_class": 3,
    "validation_per_class": 2,
    "split_seed": 0,
    "networks": {"mobilenetv2": {"rates": [0.05, 0.01], "flags": ["--epochs", "1", "-b", "3"]}},
    "variants": ["none", "SE", "ECA k=3"],
    "choosing_seeds": [7],
    "seeds": [0, 1, 2],
    "also_compare": [["ECA k=3", "SE"]],
    "level": 0.95,
}


def write_plan(file: Path, **changes: Any) -> Path:
    """Writes `SMALL` with some fields replaced; a field that is `...` is left out."""
    values = {**copy.deepcopy(SMALL), **changes}
    file.write_text(json.dumps({name: v for name, v in values.items() if v is not ...}))
    return file


def small_plan(folder: Path, **changes: Any) -> Plan:
    return read_plan(write_plan(folder / "plan.json", **changes))


def result(variant: str, rate: float, seed: int, val: float, test: float | None) -> RunResult:
    """A run of mobilenetv2 with these accuracies."""
    return RunResult(
        name=f"{variant}-{rate}-{seed}",
        network="mobilenetv2",
        variant=variant,
        rate=rate,
        seed=seed,
        epochs=1,
        best_epoch=1,
        val_top1=val,
        test_top1=test,
        test_images=None if test is None else 15,
        train_images=9,
        seconds_per_epoch=2.0 + 0.1 * len(variant),
        parameters=1000 + len(variant),
        multiply_adds=2_000_000,
        environment={"commit": "abc", "command": "=main.py"},
    )

"""Summarises the runs of a study: rates chosen, differences tested, and the CSV of every run."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from utils.study.comparison import Difference, compare, holm
from utils.study.plan import Plan
from utils.system.text import cell

Key = tuple[str, str]  # network, variant


@dataclass(frozen=True)
class RunResult:
    """Holds one run. Accuracies are top-1 in %; None where the test images did not judge it.

    Args:
        rate: learning rate.
        best_epoch: from 1, chosen by the validation part.
        seconds_per_epoch: of training alone, the median epoch.
        multiply_adds: of one image, forward.
        environment: command, commit, device and versions, as args.json has them.
    """

    name: str
    network: str
    variant: str
    rate: float
    seed: int
    epochs: int
    best_epoch: int
    val_top1: float
    test_top1: float | None
    test_images: int | None
    train_images: int
    seconds_per_epoch: float
    parameters: int
    multiply_adds: int
    environment: Mapping[str, object]


@dataclass(frozen=True)
class Comparison:
    """Compares a variant of a network with another, on the test images.

    Args:
        p: of the difference, corrected for the number of comparisons in the study.
    """

    network: str
    variant: str
    against: str
    difference: Difference
    p: float


def choose_rates(plan: Plan, runs: Sequence[RunResult]) -> dict[Key, float]:
    """Returns each variant's rate: the highest mean top-1 of validation, the lower of equal ones.

    Args:
        runs: those of the choosing seeds with every rate.
    """
    chosen = {}
    for network, how in plan.networks.items():
        for variant in plan.variants:
            means = validation_means(plan, runs, network, variant)
            chosen[network, variant] = max(how.rates, key=lambda rate, m=means: (m[rate], -rate))
    return chosen


def validation_means(
    plan: Plan, runs: Sequence[RunResult], network: str, variant: str
) -> dict[float, float]:
    """Returns {rate: mean top-1 of validation over the choosing seeds}."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if (run.network, run.variant) == (network, variant) and run.seed in plan.choosing_seeds:
            found.setdefault(run.rate, []).append(run.val_top1)
    return {rate: statistics.fmean(values) for rate, values in found.items()}


def by_variant(runs: Sequence[RunResult]) -> dict[Key, list[RunResult]]:
    """Returns the runs that the test images judged, in the order of their seeds."""
    found: dict[Key, list[RunResult]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.test_top1 is not None:
            found.setdefault((run.network, run.variant), []).append(run)
    return found


def compare_all(plan: Plan, runs: Sequence[RunResult]) -> list[Comparison]:
    """Makes the plan's comparisons, and corrects them together for their number."""
    judged = by_variant(runs)
    made = []
    for network in plan.networks:
        for variant, against in plan.pairs:
            ours, theirs = ([r.test_top1 for r in judged[network, v]] for v in (variant, against))
            made.append((network, variant, against, compare(ours, theirs, plan.level)))
    corrected = holm([difference.p for *_, difference in made])
    return [Comparison(*row, p) for row, p in zip(made, corrected, strict=True)]


def runs_csv(runs: Sequence[RunResult]) -> bytes:
    """Returns a CSV file with one row a run, and what its figures depend on."""
    own = [f.name for f in fields(RunResult) if f.name != "environment"]
    more = list(dict.fromkeys(name for run in runs for name in run.environment))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*own, *more])
    for run in runs:
        values = asdict(run)
        row = [values[name] for name in own] + [run.environment.get(name) for name in more]
        writer.writerow([_shown(value) for value in row])
    return text.getvalue().encode()


def _shown(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    return cell(value)

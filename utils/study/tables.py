"""Makes a study's tables as text: every variant, and every comparison of the plan."""

import math
import statistics
from collections.abc import Mapping, Sequence

from utils.study.plan import Plan
from utils.study.results import Comparison, Key, RunResult, by_variant, validation_means
from utils.system.text import columns, paragraphs

SIGNIFICANT = 0.05


def variant_rows(
    plan: Plan, runs: Sequence[RunResult], rates: Mapping[Key, float]
) -> list[list[str]]:
    """Returns one row a variant: its rate, its accuracy over the seeds, and what it costs."""
    rows = [
        ["network", "attention", "rate", "top-1", "± std", "runs", "parameters", "MMACs", "s/epoch"]
    ]
    for (network, variant), judged in in_order(plan, by_variant(runs)).items():
        top1 = [run.test_top1 for run in judged]
        std = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"
        seconds = statistics.median(run.seconds_per_epoch for run in judged)
        rows.append(
            [
                network,
                variant,
                f"{rates[network, variant]:g}",
                f"{statistics.fmean(top1):.2f}",
                std,
                str(len(top1)),
                f"{judged[0].parameters:,}",
                f"{judged[0].multiply_adds / 1e6:.2f}",
                f"{seconds:.1f}",
            ]
        )
    return rows


def comparison_rows(plan: Plan, comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Returns one row a comparison: points of top-1, interval, corrected p, and what it says."""
    rows = [["network", "attention", "against", "points", f"{plan.level:.0%} interval", "p", ""]]
    for found in comparisons:
        difference = found.difference
        interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
        rows.append(
            [
                found.network,
                found.variant,
                found.against,
                f"{difference.mean:+.2f}",
                "-" if math.isnan(difference.low) else interval,
                "-" if math.isnan(found.p) else f"{found.p:.3f}",
                verdict(found),
            ]
        )
    return rows


def verdict(found: Comparison) -> str:
    """Says in words what the corrected p allows to say."""
    if math.isnan(found.p):
        return "one seed says nothing" if found.difference.pairs == 1 else "no spread: says nothing"
    if found.p >= SIGNIFICANT:
        return "no difference shown"
    return "higher" if found.difference.mean > 0 else "lower"


def choice_rows(
    plan: Plan, runs: Sequence[RunResult], rates: Mapping[Key, float]
) -> list[list[str]]:
    """Returns one row a variant and rate: mean top-1 of validation, and which rate was taken."""
    rows = [["network", "attention", "rate", "validation top-1", "chosen"]]
    for network, how in plan.networks.items():
        for variant in plan.variants:
            means = validation_means(plan, runs, network, variant)
            for rate in how.rates:
                chosen = "yes" if rate == rates[network, variant] else ""
                rows.append([network, variant, f"{rate:g}", f"{means[rate]:.2f}", chosen])
    return rows


def report(
    plan: Plan,
    runs: Sequence[RunResult],
    rates: Mapping[Key, float],
    comparisons: Sequence[Comparison],
) -> str:
    """Returns the whole text: the question, the tables, and how to read them."""
    judged = [run for run in runs if run.test_top1 is not None]
    images = f"{judged[0].train_images:,} training images, {judged[0].test_images:,} test images"
    reading = "\n".join(
        (
            "rate and epoch: chosen by validation images cut from train/; top-1: of test images",
            "points: mean difference in top-1 of runs with the same seed; interval: of this row",
            f"alone; p: corrected for all {len(comparisons)} rows (Holm)",
            "MMACs: millions of multiply-adds of one image; s/epoch: training, the median run",
        )
    )
    return paragraphs(
        f"{plan.question}\n{plan.data}, {images}, plan {plan.digest[:12]}",
        columns(variant_rows(plan, runs, rates), left=2),
        columns(comparison_rows(plan, comparisons), left=3),
        reading,
    )


def in_order(plan: Plan, judged: Mapping[Key, list[RunResult]]) -> dict[Key, list[RunResult]]:
    """Returns `judged` in the order of the plan's networks and variants."""
    keys = [(network, variant) for network in plan.networks for variant in plan.variants]
    return {key: judged[key] for key in keys}

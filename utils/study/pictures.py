"""Draws the two pictures of a study: accuracy with differences, and accuracy against cost."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from utils.study.plan import NONE, Plan
from utils.study.results import Comparison, RunResult, by_variant
from utils.study.tables import in_order
from utils.system.colours import CURVES, GREY, MAIN
from utils.system.text import short

COSTS = (  # attribute of a run, and the words under its axis
    ("seconds_per_epoch", "Training time"),
    ("parameters", "Parameters"),
    ("multiply_adds", "Multiply-adds"),
)


def draw_accuracy(plan: Plan, runs: Sequence[RunResult], found: Sequence[Comparison]) -> bytes:
    """Draws for each network every run, and the differences to no attention with their intervals.

    Returns:
        A PNG.
    """
    from utils.system.picture_style import plt, png, styled

    judged = in_order(plan, by_variant(runs))
    height = max(2.4, 0.36 * len(plan.variants) + 1.3)
    with styled():
        figure, axes = plt.subplots(
            len(plan.networks),
            2,
            figsize=(9.2, height * len(plan.networks)),
            layout="constrained",
            squeeze=False,
        )
        for (left, right), network in zip(axes, plan.networks, strict=True):
            for i, variant in enumerate(plan.variants):
                top1 = [run.test_top1 for run in judged[network, variant]]
                left.plot(top1, [i] * len(top1), "o", color=GREY, markersize=5, alpha=0.7)
                left.plot(statistics.fmean(top1), i, "D", color=MAIN)
            left.set(xlabel="Test top-1 (%)", title=f"{network}: ● one run   ◆ mean")
            _draw_differences(right, plan, network, found)
            right.set_title(f"difference to none, {plan.level:.0%} interval")
            for axis in (left, right):
                axis.set_yticks(range(len(plan.variants)), [short(v) for v in plan.variants])
                axis.set_ylim(len(plan.variants) - 0.4, -0.6)
        return png(figure, colours=256)


def _draw_differences(axis: Any, plan: Plan, network: str, found: Sequence[Comparison]) -> None:
    rows = [c for c in found if c.network == network and c.against == NONE]
    axis.axvline(0, color=GREY, linewidth=1)
    for comparison in rows:
        i, difference = plan.variants.index(comparison.variant), comparison.difference
        if math.isnan(difference.low):
            axis.plot(difference.mean, i, "D", color=MAIN)
        else:
            reach = difference.high - difference.mean
            axis.errorbar(difference.mean, i, xerr=reach, fmt="D", color=MAIN, capsize=4)
    axis.set_xlabel("Points of test top-1")


def draw_costs(plan: Plan, runs: Sequence[RunResult]) -> bytes:
    """Draws for each network top-1 over what a variant costs more than no attention does.

    Returns:
        A PNG.
    """
    from utils.system.picture_style import plt, png, styled

    judged = in_order(plan, by_variant(runs))
    with styled():
        figure, axes = plt.subplots(
            len(plan.networks),
            len(COSTS),
            figsize=(9.2, 2.7 * len(plan.networks) + 0.5),
            layout="constrained",
            squeeze=False,
            sharey="row",
        )
        for row, network in zip(axes, plan.networks, strict=True):
            for axis, (attribute, words) in zip(row, COSTS, strict=True):
                plain = _median(judged[network, NONE], attribute)
                for i, variant in enumerate(plan.variants):
                    of_variant = judged[network, variant]
                    more = 100 * (_median(of_variant, attribute) / plain - 1)
                    top1 = statistics.fmean(run.test_top1 for run in of_variant)
                    colour, marker = CURVES[i % len(CURVES)], "oDs^vP"[i % 6]
                    axis.plot(more, top1, marker, color=colour, label=short(variant), ls="")
                axis.set_xlabel(f"{words}: % above none")
            row[0].set_ylabel("Test top-1 (%)")
            row[1].set_title(network)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        return png(figure, colours=256)


def _median(runs: Sequence[RunResult], attribute: str) -> float:
    return statistics.median(getattr(run, attribute) for run in runs)

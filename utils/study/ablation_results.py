"""Computes an ablation's results over several seeds: means, paired gains, table, picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.study.comparison import standard_error
from utils.study.student_t import quantile
from utils.system.colours import CURVES, GREY, MAIN
from utils.system.text import short

PLAIN = "none"  # the variant without attention, which the others are compared with
KERNELS = (1, 3, 5, 7, 9)  # of the paper's figure on k


@dataclass(frozen=True)
class Result:
    """Holds the best top-1 in % of each seed's run, in the order of the seeds."""

    name: str
    top1: tuple[float, ...]
    parameters: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        """Returns the standard deviation of the runs; nan for a single one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else math.nan


def gain(result: Result, plain: Result) -> tuple[float, float]:
    """Returns the mean difference to the plain network, seed by seed, and its `standard_error`.

    Seeds are paired because a seed fixes the order and the augmentation of the images for both.
    """
    each = [a - b for a, b in zip(result.top1, plain.top1, strict=True)]
    return statistics.fmean(each), standard_error(each)


def stands_out(result: Result, plain: Result) -> bool:
    """Returns whether 0 is outside the gain's 95 % confidence interval, by Student's t."""
    mean, error = gain(result, plain)
    if math.isnan(error):
        return False
    return abs(mean) > quantile(0.95, len(result.top1) - 1) * error


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Returns the table, its titles first. A gain that stands out is marked with a star."""
    table = [["attention", "parameters", "top-1", "± std", "gain", "± error", "runs"]]
    plain = next((r for r in results if r.name == PLAIN), None)
    for r in results:
        cells = ["-", "-"]
        if plain is not None and r is not plain:
            mean, error = gain(r, plain)
            cells = [f"{mean:+.2f}{'*' if stands_out(r, plain) else ''}", _figure(error)]
        table.append(
            [r.name, f"{r.parameters:,}", f"{r.mean:.2f}", _figure(r.std), *cells, str(len(r.top1))]
        )
    return table


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def draw(results: Sequence[Result], title: str) -> bytes:
    """Draws every variant with its runs; with two kernel sizes or more also top-1 over k.

    Returns:
        A PNG.
    """
    from matplotlib import pyplot as plt

    from utils.system.picture_style import png, styled

    by_name = {r.name: r for r in results}
    swept = [(k, by_name[f"ECA k={k}"]) for k in KERNELS if f"ECA k={k}" in by_name]
    panels = 2 if len(swept) > 1 else 1
    height = max(2.2, 0.38 * len(results) + 1.4)
    with styled():
        figure, axes = plt.subplots(
            1, panels, figsize=(4.6 * panels, height), layout="constrained", squeeze=False
        )
        left = axes[0, 0]
        for i, r in enumerate(results):
            left.plot(r.top1, [i] * len(r.top1), "o", color=GREY, markersize=5, alpha=0.7)
            left.errorbar(r.mean, i, xerr=_bar(r), fmt="D", color=MAIN, capsize=4)
        left.set_yticks(range(len(results)), [short(r.name) for r in results])
        left.set_ylim(len(results) - 0.4, -0.6)
        left.set_xlabel("Top-1 (%)")
        left.set_title("● one run   ◆ mean ± standard deviation", color=GREY)
        if panels > 1:
            _draw_sweep(axes[0, 1], swept, by_name)
        figure.suptitle(title)
        return png(figure, colours=256)


def _draw_sweep(
    axis: Any, swept: Sequence[tuple[int, Result]], by_name: Mapping[str, Result]
) -> None:
    """Draws top-1 over the kernel size, with lines for what has no k of its own."""
    sizes, means = [k for k, _ in swept], [r.mean for _, r in swept]
    for k, r in swept:
        axis.errorbar(k, r.mean, yerr=_bar(r), fmt="D", color=MAIN, capsize=4)
    axis.plot(sizes, means, color=MAIN, linewidth=1, label="ECA, one k in all stages")
    others = (("ECA adaptive", "--"), ("SE", "-."), (PLAIN, ":"))
    for (name, style), colour in zip(others, CURVES[1:], strict=False):
        if name in by_name:
            label = "no attention" if name == PLAIN else name
            axis.axhline(by_name[name].mean, color=colour, linestyle=style, label=label)
    axis.set_xticks(sizes)
    axis.set(xlabel="Kernel size k", ylabel="Top-1 (%)")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    axis.legend(loc="upper left", labelspacing=0.2)


def _bar(result: Result) -> float | None:
    return None if math.isnan(result.std) else result.std

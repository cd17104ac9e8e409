"""Pictures of channel attention: weights by class, their spread over the depth, ECA's kernels."""

import math
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from utils.inspection.channel_weights import LayerWeights
from utils.inspection.pictures import CURVES, png
from utils.system.text import short

STEPS = matplotlib.colormaps["RdBu_r"].resampled(21)  # so few that the file's palette holds them


def draw_weights(
    layers: Sequence[LayerWeights], classes: Sequence[str], shown: Sequence[int], title: str
) -> bytes:
    """A PNG: one panel a layer, channels on x, one curve for each class in `shown`.

    Each panel has the weights above, as in the paper's figure. Below, one row a class, is how they
    differ from the mean of all classes: where hundreds of channels make the curves a thicket, the
    rows can still be compared.
    """
    tall = 0.25 + 0.13 * len(shown)  # inches
    figure = plt.figure(figsize=(10, (1.75 + tall) * len(layers) + 0.6), layout="constrained")
    grid = figure.add_gridspec(2 * len(layers), 1, height_ratios=[1.5, tall] * len(layers))
    for i, layer in enumerate(layers):
        upper = figure.add_subplot(grid[2 * i])
        lower = figure.add_subplot(grid[2 * i + 1], sharex=upper)
        differences = layer.mean[list(shown)] - layer.mean.mean(0)
        reach = np.abs(differences).max() or 1.0
        for j, label in enumerate(shown):
            upper.plot(
                layer.mean[label],
                label=short(classes[label]),
                color=CURVES[j % len(CURVES)],
                linewidth=0.9 if len(differences[0]) <= 256 else 0.6,
            )
        upper.set_title(panel_title(layer), fontsize=9, loc="left")
        upper.set(ylabel="weight s", xlim=(-0.5, len(differences[0]) - 0.5))
        upper.tick_params(labelbottom=False)
        upper.grid(alpha=0.25, linewidth=0.5)
        rows = lower.imshow(
            differences,
            cmap=STEPS,
            vmin=-reach,
            vmax=reach,
            aspect="auto",
            interpolation="nearest",
        )
        lower.set_yticks(range(len(shown)), [short(classes[label], 12) for label in shown])
        for j, text in enumerate(lower.get_yticklabels()):
            text.set(color=CURVES[j % len(CURVES)], fontsize=8)
        lower.tick_params("y", length=0)
        bar = figure.colorbar(rows, ax=[upper, lower], fraction=0.02, pad=0.01, aspect=25)
        bar.set_label("s − mean of all classes", fontsize=8)
        for axis in (upper, lower, bar.ax):
            axis.tick_params("x" if axis is lower else "both", labelsize=8)
    lower.set_xlabel("channel")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper right",
        ncols=min(len(labels), 8),
        fontsize=8,
        title="class",
        title_fontsize=8,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return png(figure, colours=256)


def draw_spread(layers: Sequence[LayerWeights], title: str) -> bytes:
    """A PNG: mean weight, and its spread between and within classes, from block to block."""
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(max(6, 0.32 * len(layers) + 3), 5), sharex=True, layout="constrained"
    )
    x = np.arange(len(layers))
    flat = [layer.mean.mean(0) for layer in layers]
    low, mid, high = (np.array([np.quantile(s, q) for s in flat]) for q in (0.1, 0.5, 0.9))
    upper.fill_between(x, low, high, color="#0b5fa5", alpha=0.15, linewidth=0)
    upper.plot(x, mid, "o-", color="#0b5fa5", markersize=3.5, linewidth=1.2)
    upper.set_ylabel("weight s\n(median, 10–90 % of channels)", fontsize=8)
    for name, style, label in (
        ("within", {"color": "#7f7f7f", "linestyle": "-"}, "between images of one class"),
        ("between", {"color": "#d1495b", "linestyle": "-"}, "between the classes' means"),
        ("noise", {"color": "#d1495b", "linestyle": ":"}, "… expected by chance"),
    ):
        values = [getattr(layer, name) for layer in layers]
        lower.plot(x, values, marker="o", markersize=3.5, linewidth=1.2, label=label, **style)
    lower.set_ylabel("standard deviation of s\n(mean over channels)", fontsize=8)
    lower.set_ylim(bottom=0)
    lower.legend(fontsize=8)
    lower.set_xticks(x, [f"{a.stage}.{a.block}" for a in layers], fontsize=8)
    if len(layers) > 24:
        lower.tick_params("x", rotation=90, labelsize=6)
    lower.set_xlabel("stage.block")
    for axis in (upper, lower):
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params("y", labelsize=8)
        for i in range(1, len(layers)):
            if layers[i].stage != layers[i - 1].stage:
                axis.axvline(i - 0.5, color="0.8", linewidth=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return png(figure, colours=256)


def draw_kernels(layers: Sequence[LayerWeights], title: str) -> bytes:
    """A PNG: ECA's learned kernels, one panel a stage, one curve a block."""
    stages = sorted({layer.stage for layer in layers})
    across = min(4, len(stages))
    down = math.ceil(len(stages) / across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(2.7 * across + 0.6, 2.5 * down + 0.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, stage in zip(axes.flat, stages, strict=False):
        blocks = [layer for layer in layers if layer.stage == stage]
        named = [1, len(blocks)] if len(blocks) > 8 else range(1, len(blocks) + 1)
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(blocks)))
        for layer, shade in zip(blocks, shades, strict=True):
            reach = len(layer.kernel) // 2
            x = np.arange(-reach, reach + 1)
            axis.plot(
                x,
                layer.kernel,
                "o-",
                color=shade,
                markersize=3.5,
                linewidth=1.2,
                label=str(layer.block) if layer.block in named else None,
            )
        axis.axhline(0, color="0.6", linewidth=0.6)
        axis.set_title(f"stage {stage}, k = {len(blocks[0].kernel)}", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axis.set_xlim(-max(1, reach) - 0.3, max(1, reach) + 0.3)
        axis.set_xlabel("neighbour", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.legend(title="block", title_fontsize=7, fontsize=7, ncols=2)
    for axis in axes.flat[len(stages) :]:
        axis.axis("off")
    for row in axes:
        row[0].set_ylabel("kernel weight", fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return png(figure, colours=256)


def panel_title(layer: LayerWeights) -> str:
    k = f", k = {len(layer.kernel)}" if layer.kernel is not None else ""
    return f"stage {layer.stage}, block {layer.block}: {layer.mean.shape[1]} channels{k}"

"""Draws channel attention: weights by class, their variation over the depth, ECA's kernels."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from utils.inspection.channel_weights import LayerWeights
from utils.system.colours import DIFFERENCES, GREY, MAIN, SECOND
from utils.system.picture_style import plt, png, styled
from utils.system.text import short

STEPS = matplotlib.colormaps[DIFFERENCES].resampled(21)  # so few that the palette holds them


def draw_weights(
    layers: Sequence[LayerWeights], classes: Sequence[str], shown: Sequence[int], title: str
) -> bytes:
    """Draws how each layer weights its channels, for the classes in `shown`.

    The paper's figure draws one curve a class over all channels. Where there are hundreds of
    channels, such curves hide each other. So one row is drawn for each layer, with two panels:

    - left: the mean weight of all classes, channels in descending order, with the band that the
      classes shown span. A narrow band says that the layer treats the classes alike.
    - right: one line a class, one column a channel in the same order: how far the class's weight
      is from the mean of all classes.

    Returns:
        A PNG.
    """
    names = [short(classes[label], 16) for label in shown]
    row = max(1.35, 0.5 + 0.16 * len(shown))  # inches
    with styled():
        figure, axes = plt.subplots(
            len(layers),
            2,
            figsize=(9, row * len(layers) + 1.0),
            layout="constrained",
            squeeze=False,
            width_ratios=(1, 2.2),
        )
        for (left, right), layer in zip(axes, layers, strict=True):
            mean = layer.mean.mean(0)
            order = np.argsort(-mean, kind="stable")
            chosen = layer.mean[list(shown)][:, order]
            left.fill_between(
                range(len(order)), chosen.min(0), chosen.max(0), color=SECOND, alpha=0.35, lw=0
            )
            left.plot(mean[order], color=MAIN)
            left.set(ylim=(0, 1.02), xlim=(0, max(1, len(order) - 1)), ylabel="Weight s")
            right.set_title(panel_title(layer), loc="left")
            left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            differences = chosen - mean[order]
            reach = np.abs(differences).max() or 1.0
            rows = right.imshow(
                differences,
                cmap=STEPS,
                vmin=-reach,
                vmax=reach,
                aspect="auto",
                interpolation="nearest",
            )
            right.set_yticks(range(len(shown)), names, fontsize=8)
            right.tick_params("y", length=0)
            right.grid(False)
            right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            bar = figure.colorbar(rows, ax=right, fraction=0.03, pad=0.01, ticks=(-reach, 0, reach))
            bar.ax.set_yticklabels([f"{-reach:.2g}", "0", f"+{reach:.2g}"], fontsize=8)
        axes[-1, 0].set_xlabel("Channels, in this order")
        axes[-1, 1].set_xlabel("Channels, in descending order of the classes' mean weight")
        key = "left: mean of all classes (blue), span of the classes shown (orange)"
        figure.suptitle(f"{title}\n{key}\nright: each class minus the mean of all classes")
        return png(figure, colours=256)


def draw_one_image(layers: Sequence[LayerWeights]) -> bytes:
    """Draws the weights that every block gives its channels for one image, one row a block.

    Colour is a channel's weight minus the mean of its row, on a scale of the row's own; the mean
    and the span stand beside it. Channels are in the network's order.

    Args:
        layers: statistics of a single image.

    Returns:
        A PNG.
    """
    with styled():
        figure, axes = plt.subplots(
            len(layers),
            1,
            figsize=(6.0, 0.34 * len(layers) + 0.9),
            squeeze=False,
            layout="constrained",
        )
        for axis, layer in zip(axes[:, 0], layers, strict=True):
            weights = layer.mean[0]
            differences = weights - weights.mean()
            reach = np.abs(differences).max() or 1.0
            axis.imshow(
                differences[None],
                cmap=STEPS,
                vmin=-reach,
                vmax=reach,
                aspect="auto",
                interpolation="nearest",
            )
            name = f"{layer.stage}.{layer.block}"
            axis.set_yticks([0], [f"{name} ({len(weights)})"], fontsize=9)
            axis.set_xticks([])
            axis.tick_params("y", length=0)
            axis.grid(False)
            span = f"{weights.mean():.3f}  ({weights.min():.3f} to {weights.max():.3f})"
            axis.text(1.01, 0.5, span, transform=axis.transAxes, va="center", fontsize=9)
        words = "left: stage.block (channels); right: mean of s (its span)"
        axes[0, 0].set_title(words, loc="left", fontsize=9)
        axes[-1, 0].set_xlabel("Channels: blue below the row's mean, red above it", fontsize=9)
        return png(figure, colours=256)


def draw_spread(layers: Sequence[LayerWeights], title: str) -> bytes:
    """Draws the mean weight, and its deviation between and within classes, from block to block.

    Returns:
        A PNG.
    """
    x = np.arange(len(layers))
    flat = [layer.mean.mean(0) for layer in layers]
    low, mid, high = (np.array([np.quantile(s, q) for s in flat]) for q in (0.1, 0.5, 0.9))
    with styled():
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(max(6.5, 0.32 * len(layers) + 3), 5.4), sharex=True, layout="constrained"
        )
        upper.fill_between(x, low, high, color=MAIN, alpha=0.2, linewidth=0)
        upper.plot(x, mid, "o-", color=MAIN, markersize=4)
        upper.set_ylabel("Weight s\n(median, 10–90 % of channels)")
        for name, colour, style, label in (
            ("within", GREY, "-", "between images of one class"),
            ("between", SECOND, "-", "between the classes' means"),
            ("noise", SECOND, ":", "the same, expected by chance"),
        ):
            values = [getattr(layer, name) for layer in layers]
            lower.plot(x, values, style, marker="o", ms=4, color=colour, label=label)
        lower.set_ylabel("Standard deviation of s\n(mean over channels)")
        lower.set_ylim(0, 1.35 * lower.get_ylim()[1])  # room for the legend
        lower.legend(loc="upper left", ncols=1)
        names = [f"{layer.stage}.{layer.block}" for layer in layers]
        lower.set_xticks(x, names, rotation=90 if len(layers) > 16 else 0)
        if len(layers) > 24:
            lower.tick_params("x", labelsize=7)
        lower.set_xlabel("Stage.block")
        for axis in (upper, lower):
            for i in range(1, len(layers)):
                if layers[i].stage != layers[i - 1].stage:
                    axis.axvline(i - 0.5, color="0.8", linewidth=0.8)
        figure.suptitle(title)
        return png(figure, colours=256)


def draw_kernels(layers: Sequence[LayerWeights], title: str) -> bytes:
    """Draws ECA's learned kernels: one panel a stage with a scale of its own, one curve a block.

    Returns:
        A PNG.
    """
    stages = sorted({layer.stage for layer in layers})
    across = min(4, len(stages))
    down = math.ceil(len(stages) / across)
    with styled():
        figure, axes = plt.subplots(
            down,
            across,
            figsize=(2.6 * across + 0.4, 2.7 * down + 0.4),
            squeeze=False,
            layout="constrained",
        )
        for axis, stage in zip(axes.flat, stages, strict=False):
            _draw_stage(axis, [layer for layer in layers if layer.stage == stage])
        for axis in axes.flat[len(stages) :]:
            axis.axis("off")
        for line in axes:
            line[0].set_ylabel("Kernel weight")
        figure.suptitle(title)
        return png(figure, colours=256)


def _draw_stage(axis: plt.Axes, blocks: Sequence[LayerWeights]) -> None:
    """Draws the kernels of one stage's blocks, the first block darkest."""
    numbers = [layer.block for layer in blocks]
    named = [numbers[0], numbers[-1]] if len(blocks) > 4 else numbers
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(blocks)))
    for layer, shade in zip(blocks, shades, strict=True):
        reach = len(layer.kernel) // 2
        label = f"block {layer.block}" if layer.block in named else None
        axis.plot(range(-reach, reach + 1), layer.kernel, "o-", ms=4, color=shade, label=label)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set_title(f"Stage {blocks[0].stage}, k = {len(blocks[0].kernel)}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.set_xlim(-max(1, reach) - 0.3, max(1, reach) + 0.3)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.16 * (high - low) * min(4, len(named)))  # room for the legend
    axis.set_xlabel("Neighbour")
    axis.legend(loc="upper left", labelspacing=0.2)


def panel_title(layer: LayerWeights) -> str:
    k = f", k = {len(layer.kernel)}" if layer.kernel is not None else ""
    return f"stage {layer.stage}, block {layer.block}: {layer.mean.shape[1]} channels{k}"

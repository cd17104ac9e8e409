"""Averages the channel weights of a network by class, and draws them."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from models.eca_module import ECALayer
from models.inspection import AttentionLayer
from utils.system.files import write_atomically
from utils.system.style import DIFFERENCES, GREY, MAIN, SECOND, png, styled
from utils.system.text import columns, short


@dataclass(frozen=True)
class LayerWeights:
    """Holds the channel weights s of one attention layer over a set of images."""

    name: str  # the layer's in the network
    # stage, block: counted from 1
    stage: int
    block: int
    mean: np.ndarray  # (classes, channels) mean over the images of each class
    # (classes, channels) standard deviation over the images of each class; NaN for one
    std: np.ndarray
    counts: np.ndarray  # (classes,) images
    kernel: np.ndarray | None  # (k,) ECA's learned weights, or None

    @property
    def between(self) -> float:
        """Returns the standard deviation of the classes' means, averaged over channels."""
        return float(self.mean.std(0, ddof=1).mean()) if len(self.mean) > 1 else 0.0

    @property
    def within(self) -> float:
        """Returns the standard deviation of images of one class, averaged over channels.

        NaN where every class has a single image.
        """
        return float(np.sqrt(self._variance).mean())

    @property
    def noise(self) -> float:
        """Returns the `between` that chance alone gives, when classes do not differ at all.

        A class with a single image, whose own variance is unknown, has that of the others.
        """
        alone = self.counts[:, None] < 2
        variance = np.where(alone, self._variance, self.std**2)
        return float(np.sqrt((variance / self.counts[:, None]).mean(0)).mean())

    @property
    def _variance(self) -> np.ndarray:
        """Returns (channels,) variances of images of one class: the mean of those known."""
        known = self.std[self.counts > 1] ** 2
        return known.mean(0) if len(known) else np.full(self.std.shape[1], np.nan)


class GateStatistics:
    """Sums, by class, the weights that `models.inspection.recorded_gates` records."""

    def __init__(self, classes: int):
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.sums: dict[str, torch.Tensor] = {}  # name → (2, classes, channels): s and s²

    def update(self, gates: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Adds a batch: {name: (N, channels)} and the class of each image, (N,) int64."""
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        for name, gate in gates.items():
            gate = gate.cpu().double()
            if name not in self.sums:
                shape = (2, len(self.counts), gate.shape[1])
                self.sums[name] = torch.zeros(shape, dtype=torch.float64)
            self.sums[name][0].index_add_(0, labels, gate)
            self.sums[name][1].index_add_(0, labels, gate.square())

    def layer(self, of: AttentionLayer) -> LayerWeights:
        """Returns the statistics of an attention layer of the network."""
        counts = self.counts[:, None]
        mean, square = self.sums[of.name] / counts
        # 0 / 0 for a single image, which says nothing of a variance.
        variance = (square - mean.square()).clamp(min=0) * counts * (counts > 1) / (counts - 1)
        kernel = None
        if isinstance(of.layer, ECALayer):
            kernel = of.layer.conv.weight.detach().flatten().double().cpu().numpy()
        return LayerWeights(
            of.name,
            of.stage,
            of.block,
            mean=mean.numpy(),
            std=variance.sqrt().numpy(),
            counts=self.counts.numpy(),
            kernel=kernel,
        )


def table(layers: Sequence[LayerWeights]) -> str:
    """Returns one line a layer: what the pictures show, in numbers."""
    rows = [["layer", "channels", "mean s", "between", "noise", "within", "kernel"]]
    for layer in layers:
        kernel = "-" if layer.kernel is None else " ".join(f"{w:+.3f}" for w in layer.kernel)
        figures = (layer.mean.mean(), layer.between, layer.noise, layer.within)
        rows.append([layer.name, str(layer.mean.shape[1]), *map(_figure, figures), kernel])
    return columns(rows)


def _figure(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def write_npz(path: Path, layers: Sequence[LayerWeights], classes: Sequence[str]) -> None:
    """Writes NAME.mean, NAME.std and NAME.kernel of each layer, `classes` and `images`."""
    arrays: dict[str, Any] = {
        "classes": np.array(classes),
        "images": layers[0].counts.astype(np.int64),
    }
    for layer in layers:
        arrays[f"{layer.name}.mean"] = layer.mean.astype(np.float32)
        arrays[f"{layer.name}.std"] = layer.std.astype(np.float32)
        if layer.kernel is not None:
            arrays[f"{layer.name}.kernel"] = layer.kernel.astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


STEPS = matplotlib.colormaps[DIFFERENCES].resampled(21)  # so few that the palette holds them
NARROWEST = 0.02  # that an axis of weights spans at least: less is one line


def draw_weights(
    layers: Sequence[LayerWeights], classes: Sequence[str], shown: Sequence[int], title: str
) -> bytes:
    """Draws how each layer weights its channels, for the classes in `shown`. Returns a PNG.

    The curves of the paper's figure, one a class over all channels, hide each other where there are
    hundreds. So each layer has a row of two panels, channels in descending order: left the mean
    weight of all classes and the band that the classes shown span, right how far each class's
    weight is from that mean.
    """
    names = [short(classes[label], 16) for label in shown]
    height = max(1.35, 0.5 + 0.16 * len(shown)) * len(layers) + 0.7  # inches
    with styled() as plt:
        shape = {"figsize": (9, height), "width_ratios": (1, 2.2), "squeeze": False}
        figure, axes = plt.subplots(len(layers), 2, **shape)
        for (left, right), layer in zip(axes, layers, strict=True):
            mean = layer.mean.mean(0)
            order = np.argsort(-mean, kind="stable")
            chosen = layer.mean[list(shown)][:, order]
            low, high = chosen.min(0), chosen.max(0)
            left.fill_between(range(len(order)), low, high, color=SECOND, alpha=0.35, lw=0)
            left.plot(mean[order], color=MAIN)
            bottom, top = min(low.min(), mean.min()), max(high.max(), mean.max())
            room = max(0.05 * (top - bottom), (NARROWEST - top + bottom) / 2)
            left.set(ylim=(bottom - room, top + room), xlim=(0, max(1, len(order) - 1)))
            left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            left.yaxis.set_major_locator(MaxNLocator(nbins=4))
            right.set_title(panel_title(layer), loc="left")
            rows, reach = _draw_differences(right, chosen - mean[order])
            right.set_yticks(range(len(shown)), names, fontsize=8)
            right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            bar = figure.colorbar(rows, ax=right, fraction=0.03, pad=0.01, ticks=(-reach, 0, reach))
            bar.ax.set_yticklabels([f"{-reach:.2g}", "0", f"+{reach:.2g}"], fontsize=8)
            left.set_ylabel("Weight s")
        axes[-1, 0].set_xlabel("Channels: mean of all\nclasses, span of those shown")
        order_of_all = "Channels, in descending order of the mean:\neach class minus the mean"
        axes[-1, 1].set_xlabel(order_of_all)
        figure.suptitle(title)
        return png(figure)


def draw_one_image(layers: Sequence[LayerWeights]) -> bytes:
    """Draws the weights that every block gives its channels for one image. Returns a PNG.

    Colour is a channel's weight minus the mean of its row, on a scale of the row's own; the mean
    and the span stand beside it. Channels are in the network's order.
    """
    with styled() as plt:
        size = (6.0, 0.34 * len(layers) + 0.9)  # inches
        figure, axes = plt.subplots(len(layers), 1, figsize=size, squeeze=False)
        for axis, layer in zip(axes[:, 0], layers, strict=True):
            s = layer.mean[0]
            _draw_differences(axis, (s - s.mean())[None])
            axis.set_yticks([0], [f"{layer.stage}.{layer.block} ({len(s)})"], fontsize=9)
            axis.set_xticks([])
            span = f"{s.mean():.3f}  ({s.min():.3f} to {s.max():.3f})"
            axis.text(1.01, 0.5, span, transform=axis.transAxes, va="center", fontsize=9)
        text = "left: stage.block (channels); right: mean of s (its span)"
        axes[0, 0].set_title(text, loc="left", fontsize=9)
        axes[-1, 0].set_xlabel("Channels: blue below the row's mean, red above it", fontsize=9)
        return png(figure)


def _draw_differences(axis: Axes, differences: np.ndarray) -> tuple[AxesImage, float]:
    """Draws rows of differences in colour; returns them and the end of their scale."""
    reach = np.abs(differences).max() or 1.0
    scale: dict[str, Any] = {"cmap": STEPS, "vmin": -reach, "vmax": reach}
    rows = axis.imshow(differences, aspect="auto", interpolation="nearest", **scale)
    axis.tick_params("y", length=0)
    axis.grid(False)
    return rows, reach


def draw_spread(layers: Sequence[LayerWeights], title: str) -> bytes:
    """Draws the weights' median, and their deviation between and within classes, from block to
    block. Returns a PNG.
    """
    x = np.arange(len(layers))
    flat = [layer.mean.mean(0) for layer in layers]
    low, mid, high = (np.array([np.quantile(s, q) for s in flat]) for q in (0.1, 0.5, 0.9))
    with styled() as plt:
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(max(6.5, 0.32 * len(layers) + 3), 5.4), sharex=True
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
        lower.set_ylim(bottom=0)
        figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
        return png(figure)


def draw_kernels(layers: Sequence[LayerWeights], title: str) -> bytes:
    """Draws ECA's kernels: a panel a stage, on its own scale, a curve a block. Returns a PNG."""
    stages = sorted({layer.stage for layer in layers})
    across = min(4, len(stages))
    down = math.ceil(len(stages) / across)
    with styled() as plt:
        size = (2.6 * across + 0.4, 2.9 * down + 0.4)
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
        for axis, stage in zip(axes.flat, stages, strict=False):
            _draw_stage(axis, [layer for layer in layers if layer.stage == stage])
        for axis in axes.flat[len(stages) :]:
            axis.axis("off")
        for line in axes:
            line[0].set_ylabel("Kernel weight")
        figure.suptitle(title)
        return png(figure)


def _draw_stage(axis: Axes, blocks: Sequence[LayerWeights]) -> None:
    """Draws the kernels of one stage's blocks, the first block darkest."""
    numbers = [layer.block for layer in blocks]
    named = [numbers[0], numbers[-1]] if len(blocks) > 4 else numbers
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(blocks)))
    kernels = [np.asarray(layer.kernel) for layer in blocks]
    for number, kernel, shade in zip(numbers, kernels, shades, strict=True):
        reach = len(kernel) // 2
        label = f"block {number}" if number in named else None
        axis.plot(range(-reach, reach + 1), kernel, "o-", ms=4, color=shade, label=label)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set_title(f"Stage {blocks[0].stage}, k = {len(kernels[0])}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.set_xlim(-max(1, reach) - 0.3, max(1, reach) + 0.3)
    axis.set_xlabel("Neighbour")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, columnspacing=1)


def panel_title(layer: LayerWeights) -> str:
    k = f", k = {len(layer.kernel)}" if layer.kernel is not None else ""
    return f"stage {layer.stage}, block {layer.block}: {layer.mean.shape[1]} channels{k}"

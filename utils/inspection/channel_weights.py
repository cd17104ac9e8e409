"""Gathers channel weights of attention layers by class: means, deviations, and files of them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.system.files import write_atomically
from utils.system.text import columns


@dataclass(frozen=True)
class LayerWeights:
    """Holds the channel weights s of one attention layer over a set of images.

    Attributes:
        name: the layer's in the network.
        stage, block: counted from 1.
        mean: (classes, channels) mean over the images of each class.
        std: (classes, channels) standard deviation over the images of each class; NaN for one.
        counts: (classes,) images.
        kernel: (k,) ECA's learned weights, or None.
    """

    name: str
    stage: int
    block: int
    mean: np.ndarray
    std: np.ndarray
    counts: np.ndarray
    kernel: np.ndarray | None

    @property
    def between(self) -> float:
        """Returns how much classes differ: the standard deviation of their means, averaged over
        channels.
        """
        return float(self.mean.std(0, ddof=1).mean()) if len(self.mean) > 1 else 0.0

    @property
    def within(self) -> float:
        """Returns how much images of one class differ: their standard deviation, averaged over
        channels.

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
        """Returns (channels,) variances of images of one class: the mean over classes where it is
        known.
        """
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

    def layer(self, name: str, stage: int, block: int, kernel: torch.Tensor | None) -> LayerWeights:
        """Returns the statistics of the layer `name`."""
        counts = self.counts[:, None]
        mean, square = self.sums[name] / counts
        # 0 / 0 for a single image, which says nothing of a variance.
        variance = (square - mean.square()).clamp(min=0) * counts * (counts > 1) / (counts - 1)
        return LayerWeights(
            name,
            stage,
            block,
            mean.numpy(),
            variance.sqrt().numpy(),
            self.counts.numpy(),
            None if kernel is None else kernel.flatten().double().cpu().numpy(),
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
    arrays = {"classes": np.array(classes), "images": layers[0].counts.astype(np.int64)}
    for layer in layers:
        arrays[f"{layer.name}.mean"] = layer.mean.astype(np.float32)
        arrays[f"{layer.name}.std"] = layer.std.astype(np.float32)
        if layer.kernel is not None:
            arrays[f"{layer.name}.kernel"] = layer.kernel.astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())

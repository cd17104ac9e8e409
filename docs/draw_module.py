"""Draws docs/images/eca_module.png: the ECA module, with k = 5 of a layer's channels at work.

python docs/draw_module.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

CHANNELS, K = 9, 5
COLOURS = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, CHANNELS))
TARGET = 4  # the channel whose neighbours are drawn


def feature_map(axis, x: float, y: float, strength: np.ndarray, label: str) -> None:
    """C slices, one behind the other; `strength` (C,) is their opacity."""
    side, lean = 1.5, 0.16
    for c in reversed(range(CHANNELS)):
        dx, dy = c * lean, c * lean * 0.8
        corners = [
            (x + dx, y + dy),
            (x + dx + side, y + dy),
            (x + dx + side, y + dy + side),
            (x + dx, y + dy + side),
        ]
        axis.add_patch(Polygon(corners, facecolor="white", edgecolor="none"))
        axis.add_patch(
            Polygon(corners, facecolor=(*COLOURS[c][:3], strength[c]), edgecolor="0.25", lw=0.8)
        )
    axis.text(x + 1.35, y - 0.35, label, ha="center", va="top", fontsize=12)


def column(axis, x: float, values: np.ndarray, label: str) -> list[tuple[float, float]]:
    """One cell per channel; returns the cells' centres."""
    size, bottom = 0.34, 0.35
    centres = []
    for c in range(CHANNELS):
        y = bottom + c * size
        axis.add_patch(
            Rectangle((x, y), size, size, facecolor=(*COLOURS[c][:3], values[c]), edgecolor="0.25")
        )
        centres.append((x + size / 2, y + size / 2))
    axis.text(x + size / 2, bottom - 0.25, label, ha="center", va="top", fontsize=12)
    return centres


def arrow(axis, start, end, **style) -> None:
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color="0.2", **style)
    )


def draw(path: Path) -> None:
    chance = np.random.default_rng(3)
    pooled = chance.uniform(0.25, 0.9, CHANNELS)
    kernel = np.array([-0.3, 0.1, 1.0, 0.1, -0.3])
    mixed = np.convolve(pooled - pooled.mean(), kernel, mode="same")
    gate = 1 / (1 + np.exp(-14 * mixed))

    figure, axis = plt.subplots(figsize=(11, 3.7), layout="constrained")
    feature_map(axis, 0.2, 0.5, np.full(CHANNELS, 0.75), "x   (C × H × W)")
    left = column(axis, 4.6, pooled, "pooled (C)")
    right = column(axis, 6.9, 0.15 + 0.85 * gate, "weights s (C)")
    feature_map(axis, 9.4, 0.5, 0.1 + 0.85 * gate, "x · s   (C × H × W)")

    arrow(axis, (3.1, 2.0), (4.45, 2.0), lw=1.4)
    axis.text(3.78, 2.2, "global\naverage\npooling", ha="center", va="bottom", fontsize=10)
    for c in range(TARGET - K // 2, TARGET + K // 2 + 1):
        start = (left[c][0] + 0.2, left[c][1])
        axis.plot([start[0], right[TARGET][0] - 0.2], [start[1], right[TARGET][1]], "0.35", lw=1.2)
    axis.text(
        5.92,
        3.5,
        f"1-D convolution over the channels,\nk = {K} shared weights, then σ",
        ha="center",
        va="bottom",
        fontsize=10,
    )
    arrow(axis, (7.4, 2.0), (9.2, 2.0), lw=1.4)
    axis.text(8.3, 2.2, "each channel\ntimes its weight", ha="center", va="bottom", fontsize=10)
    arrow(axis, (2.2, 3.45), (10.7, 3.45), lw=1.0, connectionstyle="arc3,rad=-0.23", ls="--")
    axis.text(6.45, 4.5, "x itself, unchanged", ha="center", va="bottom", fontsize=10)
    axis.set(xlim=(0, 12.4), ylim=(-0.4, 5.0), aspect="equal")
    axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / "images" / "eca_module.png"
    draw(target)
    print(f"wrote {target}")

"""Draws docs/images/passes.png: how often a block's tail reads and writes its (N, C, H, W) tensors.

    python docs/draw_passes.py

One square is one pass over a tensor of that size: r reads it, w writes it. Counted from the
operations that eager PyTorch runs for BatchNorm → ECA → addition → ReLU in training.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

MODULES = {
    "forward": [
        ("BN: moments", "r"),
        ("BN: scale", "rw"),
        ("pool", "r"),
        ("· gate", "rw"),
        ("+ residual", "rrw"),
        ("ReLU", "rw"),
    ],
    "backward": [
        ("ReLU", "rrw"),
        ("· gate: ∂y", "rw"),
        ("· gate: ∂s", "rrwr"),
        ("pool", "w"),
        ("add both ∂y", "rrw"),
        ("BN: sums", "rr"),
        ("BN: ∂z", "rrw"),
    ],
}
FUSED = {
    "forward": [("moments", "r"), ("scale, add, ReLU", "rrw")],
    "backward": [("sums, ∂residual", "rrrw"), ("∂z", "rrw")],
}
COLOURS = {"r": "#4c78a8", "w": "#f58518"}


def row(axis, y: float, title: str, operations: list[tuple[str, str]]) -> None:
    total = sum(len(passes) for _, passes in operations)
    axis.text(-0.3, y + 0.4, f"{title}: {total}", ha="right", va="center", fontsize=11)
    x = 0.0
    for name, passes in operations:
        for i, kind in enumerate(passes):
            axis.add_patch(Rectangle((x + i, y), 0.92, 0.8, color=COLOURS[kind]))
            axis.text(x + i + 0.46, y + 0.4, kind, ha="center", va="center", color="white")
        axis.text(x + len(passes) / 2, y - 0.12, name, ha="center", va="top", fontsize=8)
        x += len(passes) + 0.9


def legend(axis, x: float, y: float) -> None:
    """Says what squares and letters are, in the free corner."""
    words = {
        "r": "reads a tensor of N × C × H × W numbers",
        "w": "writes one",
    }
    for i, (kind, text) in enumerate(words.items()):
        axis.add_patch(Rectangle((x, y - i), 0.92, 0.8, color=COLOURS[kind]))
        axis.text(x + 0.46, y + 0.4 - i, kind, ha="center", va="center", color="white")
        axis.text(x + 1.2, y + 0.4 - i, text, va="center", fontsize=10)
    lines = (
        "y = s · z + residual, then ReLU",
        "s: ECA's gate, from the mean of z",
        "z: BatchNorm's output",
        "∂: gradient of the loss",
    )
    axis.text(x, y - 1.4, "\n".join(lines), fontsize=9, va="top")


def draw(path: Path) -> None:
    figure, axis = plt.subplots(figsize=(12, 4.4), layout="constrained")
    for base, title, form in ((5.2, "module by module", MODULES), (1.0, "fused", FUSED)):
        axis.text(0, base + 2.1, title, fontsize=12, weight="bold")
        row(axis, base + 1.0, "forward", form["forward"])
        row(axis, base - 0.6, "backward", form["backward"])
    legend(axis, 15.0, 2.6)
    axis.set(xlim=(-4, 26), ylim=(-0.2, 8))
    axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / "images" / "passes.png"
    draw(target)
    print(f"wrote {target}")

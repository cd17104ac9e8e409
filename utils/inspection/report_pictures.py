"""Draws the report of an evaluation: confusions, calibration, the images with the highest loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from utils.inspection.pictures import RIGHT, WRONG, Cell, draw_grid
from utils.system.colours import GREY, MAIN, SECOND
from utils.system.picture_style import drawable, plt, png, styled
from utils.system.text import printable, short

MATRIX = 20  # classes up to which the whole matrix is drawn, with its numbers
PAIRS = 20  # most confused pairs that are drawn
NAME, SIDE_NAME = 30, 16  # characters of a class's name in a table, and beside a matrix
CELL = 176  # pixels of an image in the grid
TRUE, PATH = 12, 22  # characters of the true class and of the path below it


@dataclass(frozen=True)
class Confusion:
    """Holds one pair of classes that the network confuses."""

    true: int
    found: int
    images: int
    share: float  # of the true class's images, 0 to 1


@dataclass(frozen=True)
class Judged:
    """Holds one image and what was found in it.

    Args:
        image: None where it cannot be read any more.
        path: below the folder, or inside the shards.
        true, found: classes; found is below 0 where the network's output is not finite.
        probability: of `found`, 0 to 1.
        true_probability: of `true`.
    """

    image: Image.Image | None
    path: str
    true: int
    found: int
    probability: float
    true_probability: float


def class_name(names: Sequence[str], number: int, most: int = NAME) -> str:
    """Returns a class's name as a picture shows it: cut, or its number where the font lacks it."""
    return short(drawable(printable(names[number]), f"class {number}"), most)


def draw_matrix(matrix: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Draws the confusion matrix with its numbers, for at most MATRIX classes.

    Args:
        matrix: (C, C) counts: rows are true classes, columns found ones.

    Returns:
        A PNG.
    """
    n = len(names)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    diagonal = np.eye(n, dtype=bool)
    colours = np.where(diagonal[..., None], to_rgb(MAIN), to_rgb(SECOND))
    depth = np.sqrt(shares)[..., None]  # a share of 1 % would be white otherwise
    picture = 1 - depth * (1 - colours)
    labels = [class_name(names, i, SIDE_NAME) for i in range(n)]
    digits = len(str(matrix.max(initial=0)))
    cell = max(0.44, 0.1 * digits + 0.12)  # inches
    with styled():
        figure, axis = plt.subplots(
            figsize=(max(4.9, cell * n + 2.4), max(3.2, cell * n + 2.2)), layout="constrained"
        )
        axis.imshow(picture)
        for row, column in np.argwhere(matrix > 0):
            dark = depth[row, column, 0] > 0.72
            number = str(matrix[row, column])
            colour = "white" if dark else "#1f2328"
            axis.text(column, row, number, ha="center", va="center", fontsize=9.5, color=colour)
        longest = max(map(len, labels))
        turned = 0 if longest <= 6 * cell / 0.5 else 90
        axis.set_xticks(range(n), labels, rotation=turned)
        axis.set_yticks(range(n), labels)
        axis.set_xticks(np.arange(n - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(n - 1) + 0.5, minor=True)
        axis.grid(False)
        axis.grid(which="minor", color="white", linewidth=1.5, alpha=1)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set_color("#d0d7de")
        axis.spines[:].set_visible(True)
        axis.set(xlabel="Found class", ylabel="True class")
        figure.suptitle(f"{title}\nblue: right, orange: confused; darker: more of the row")
        return png(figure, colours=256)


def draw_pairs(pairs: Sequence[Confusion], names: Sequence[str], title: str) -> bytes:
    """Draws the most confused pairs as a table with bars. Returns a PNG.

    Args:
        pairs: the most frequent first; the first PAIRS are drawn.
    """
    shown = list(pairs)[:PAIRS]
    width, row, head = 9.2, 0.27, 0.85  # inches
    height = head + row * max(1, len(shown)) + 0.15
    with styled():
        figure = plt.figure(figsize=(width, height))
        figure.suptitle(title, y=1 - 0.12 / height, va="top")
        axis = figure.add_axes((0, 0.15 / height, 1, (height - head - 0.15) / height))
        axis.set(xlim=(0, 1), ylim=(max(1, len(shown)) - 0.5, -0.5))
        axis.axis("off")
        if not shown:
            axis.text(0.5, 0, "no image was taken for another class", ha="center", va="center")
            return png(figure, colours=256)
        columns = (
            (0.02, "True class"),
            (0.335, "Found class"),
            (0.65, "Images (of the true class)"),
        )
        for x, words in columns:
            at = 1 - (head - 0.14) / height
            figure.text(x, at, words, fontsize=9.5, color=GREY, va="center")
        for place, pair in enumerate(shown):
            for x, number in ((0.02, pair.true), (0.335, pair.found)):
                axis.text(x, place, class_name(names, number), va="center", fontsize=9.5)
            bar = 0.2 * min(1.0, pair.share)
            axis.barh(place, bar, left=0.65, height=0.6, color=SECOND)
            words = f"{pair.images:,} ({100 * pair.share:.0f} %)"
            axis.text(0.66 + bar, place, words, va="center", fontsize=9.5)
        return png(figure, colours=256)


def draw_calibration(
    images: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray, error: float, title: str
) -> bytes:
    """Draws the reliability diagram, and below it how many images have which confidence.

    Args:
        images, confidence, accuracy: (bins,), of equally wide bins from 0 to 1; NaN where a bin is
            empty.
        error: the expected calibration error, 0 to 1.

    Returns:
        A PNG.
    """
    bins = len(images)
    there = images > 0
    middle = 100 * (np.arange(bins) + 0.5)[there] / bins
    with styled():
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(5.2, 6.4), sharex=True, height_ratios=(3, 1), layout="constrained"
        )
        bar = {"width": 0.94 * 100 / bins}
        right, sure = 100 * accuracy[there], 100 * confidence[there]
        both = np.minimum(right, sure)
        upper.bar(middle, both, color=MAIN, **bar)
        upper.bar(middle, np.maximum(0, right - sure), bottom=both, color="#56B4E9", **bar)
        upper.bar(middle, np.maximum(0, sure - right), bottom=both, color="#f0b487", **bar)
        upper.plot((0, 100), (0, 100), color=GREY, ls="--", lw=1)
        upper.set(ylabel="Right answers (%)", ylim=(0, 100), xlim=(0, 100))
        words = ["right answers", "underconfident", "overconfident"]
        handles = [*upper.containers, *upper.lines]
        upper.legend(handles, [*words, "perfect calibration"], loc="upper left")
        share = 100 * images / max(1, images.sum())
        lower.bar(middle, share[there], color="#b6bcc4", **bar)
        lower.set(xlabel="Confidence of the network (%)", ylabel="Images (%)")
        lower.set_ylim(0, max(1.0, 1.08 * share.max(initial=0)))
        words = f"expected calibration error {100 * error:.2f} %" if there.any() else "no image"
        figure.suptitle(f"{title}\n{words}")
        return png(figure, colours=256)


def draw_worst(images: Sequence[Judged], names: Sequence[str], title: str) -> bytes:
    """Draws images with path, true and found class, and the probability of each. Returns a PNG."""
    return draw_grid([_cell(i, image, names) for i, image in enumerate(images, 1)], title, CELL)


def _cell(rank: int, judged: Judged, names: Sequence[str]) -> Cell:
    """Makes a picture of the grid. Long names and paths are cut; numbers never are."""
    found, sure = "nothing finite", ""
    if judged.found >= 0:
        found = _plain_name(names, judged.found)
        sure = f"found with {_in_percent(judged.probability)}"
    true = _plain_name(names, judged.true)
    true = true if len(true) <= TRUE else f"{true[: TRUE - 1]}…"
    path = drawable(judged.path, "see worst_images.csv")
    # The end of a path tells more than its beginning, which is the class.
    path = path if len(path) <= PATH else f"…{path[1 - PATH :]}"
    colour = RIGHT if judged.found == judged.true else WRONG
    image = judged.image or Image.new("RGB", (CELL, CELL), "#d0d7de")
    lines = (sure, f"true: {true} ({_in_percent(judged.true_probability)})", f"{rank}. {path}")
    return Cell(image, found, "\n".join(lines), colour)


def _plain_name(names: Sequence[str], number: int) -> str:
    """Returns a class's name for Pillow, which reads no formulas."""
    return drawable(printable(names[number]), f"class {number}")


def _in_percent(share: float) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else "-"

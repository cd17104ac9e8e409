"""Draws an image with its class-activation map, and a report's confusions and calibration."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from utils.system.style import CURVES, GREY, MAIN, PLAIN, SECOND, plain_name, png, scaled, styled
from utils.system.text import short

SIDE = 448  # pixels of a picture's longer side beside its map
COLOURS = LinearSegmentedColormap.from_list("heat", ["#3b0f70", "#b73779", "#fc8961", "#fcfdbf"])
MATRIX = 20  # classes up to which the whole matrix is drawn, with its numbers
PAIRS = 20  # most confused pairs that are drawn
NAME, SIDE_NAME = 30, 16  # characters of a class's name in a list, and beside a matrix


def seen_square(width: int, height: int, img_size: int, crop_pct: float) -> tuple[float, ...]:
    """Returns what `Preprocessing` leaves of an image: (left, top, side) in its own pixels."""
    short = min(width, height)
    side = short * img_size / round(img_size / crop_pct)
    return (width - side) / 2, (height - side) / 2, side


def draw_evidence(image: Image.Image, heat: np.ndarray, square: tuple[float, ...]) -> Image.Image:
    """Returns the image with its class-activation map over it; arguments as in `draw_map`."""
    shown, scale = scaled(image, SIDE)
    overlay = _overlay(np.asarray(shown) / 255, heat, [scale * value for value in square])
    return Image.fromarray((255 * overlay).round().astype(np.uint8))


def draw_map(
    image: Image.Image,
    heat: np.ndarray,
    square: tuple[float, ...],
    title: str,
    ranking: Sequence[tuple[str, float]],
    where: str,
) -> bytes:
    """Returns a PNG: the image, its class-activation map over it, and the most likely classes.

    Args:
        image: as the user has it.
        heat: (h, w) from 0 to 1, of the part that the network saw.
        square: that part, see `seen_square`; what lies outside is darkened.
        title: of the whole, such as the file name.
        ranking: (class, confidence from 0 to 1), the most likely first; the map is for the first.
        where: the layer that the map is of.
    """
    shown, scale = scaled(image, SIDE)
    overlay = _overlay(np.asarray(shown) / 255, heat, [scale * value for value in square])

    with styled():
        figure, (left, middle, bar, right) = _map_axes(shown.size, [name for name, _ in ranking])
        left.imshow(shown)
        middle.imshow(overlay)
        for axis, text in ((left, title), (middle, f"evidence for “{short(ranking[0][0])}”")):
            axis.set_title(short(text, 36), fontsize=9)
            axis.axis("off")
        figure.colorbar(matplotlib.cm.ScalarMappable(cmap=COLOURS), cax=bar, ticks=(0, 1))
        bar.set_yticklabels(("none", "most"), fontsize=8)
        bar.tick_params(length=0)
        bar.spines[:].set_visible(False)
        below: dict[str, Any] = {"transform": middle.transAxes, "ha": "center", "va": "top"}
        depth = -0.07 / (3.2 * shown.height / SIDE)
        middle.text(0.5, depth, f"Grad-CAM on {where}", fontsize=8, color="0.4", **below)
        _draw_ranking(right, ranking)
        return png(figure, colours=None)


def _map_axes(size: Sequence[int], names: Sequence[str]) -> tuple[Figure, tuple[Axes, ...]]:
    """Places, in inches, two pictures of `size` pixels, the colours' scale, and the bars."""
    wide, tall = (3.2 * pixels / SIDE for pixels in size)
    gap, head, foot, bars, least = 0.15, 0.4, 0.3, 1.6, 2.3
    text = 0.2 + 0.075 * max(len(short(name)) for name in names)
    width = gap + 2 * (max(wide, least) + gap) + 0.7 + text + bars + gap
    height = head + max(tall, least) + foot
    figure = plt.figure(figsize=(width, height), layout="none")

    def axes(x: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / width, (height - head - h) / height, w / width, h / height))

    shift = max(0, least - wide) / 2
    x = 2 * gap + 2 * max(wide, least) - shift
    return figure, (
        axes(gap + shift, wide, tall),
        axes(2 * gap + max(wide, least) + shift, wide, tall),
        axes(x + 0.08, 0.1, tall),
        axes(x + 0.7 + shift + text, bars, max(tall, least)),
    )


def _draw_ranking(axis: Axes, ranking: Sequence[tuple[str, float]]) -> None:
    """Draws the most likely classes as bars with their confidences."""
    names = [short(name) for name, _ in ranking]
    shares = [100 * confidence for _, confidence in ranking]
    rows = range(len(names))
    axis.barh(rows, shares, color=["#b73779", *["#b6bcc4"] * (len(names) - 1)], height=0.62)
    for row, share in zip(rows, shares, strict=True):
        axis.text(share + 2, row, f"{share:.1f} %", va="center", fontsize=8)
    axis.set(xlim=(0, 140), xticks=(), ylim=(max(4.6, len(names) - 0.4), -0.6))
    axis.set_yticks(rows, names, fontsize=8)
    axis.tick_params(left=False)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title("confidence", fontsize=9, loc="left")


def _overlay(picture: np.ndarray, heat: np.ndarray, square: Sequence[float]) -> np.ndarray:
    """Draws `heat` in colour over its square of `picture` (H, W, 3 from 0 to 1)."""
    left, top, side = square
    tall, wide = picture.shape[:2]
    smooth = Image.fromarray(heat.astype(np.float32)).resize(
        (max(1, round(side)),) * 2, Image.Resampling.BICUBIC
    )
    whole = Image.new("F", (wide, tall), -1.0)
    whole.paste(smooth, (round(left), round(top)))
    warmth = np.asarray(whole)
    grey = 0.8 * picture.mean(2, keepdims=True) + 0.2 * picture
    seen = (warmth >= -0.5)[..., None]
    share = 0.75 * warmth.clip(0, 1)[..., None]
    coloured = grey * (1 - share) + COLOURS(warmth.clip(0, 1))[..., :3] * share
    return np.asarray(np.where(seen, coloured, 0.3 * grey))


def draw_matrix(matrix: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Draws the confusion matrix with its numbers, for at most MATRIX classes. Returns a PNG.

    Args:
        matrix: (C, C) counts: rows are true classes, columns predicted ones.
    """
    n = len(names)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    colours = np.where(np.eye(n, dtype=bool)[..., None], to_rgb(MAIN), to_rgb(SECOND))
    depth = np.sqrt(shares)  # a share of 1 % would be white otherwise
    labels = [short(plain_name(names, i), SIDE_NAME) for i in range(n)]
    cell = max(0.44, 0.1 * len(str(matrix.max(initial=0))) + 0.12)  # inches
    size = (max(4.9, cell * n + 2.4), max(3.2, cell * n + 2.2))
    with styled():
        figure, axis = plt.subplots(figsize=size)
        axis.imshow(1 - depth[..., None] * (1 - colours))
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if depth[row, column] > 0.72 else PLAIN
            text = str(matrix[row, column])
            axis.text(column, row, text, ha="center", va="center", fontsize=9.5, color=colour)
        turned = 0 if max(map(len, labels)) <= 6 * cell / 0.5 else 90
        axis.set_xticks(range(n), labels, rotation=turned)
        axis.set_yticks(range(n), labels)
        for ticks in (axis.set_xticks, axis.set_yticks):
            ticks(np.arange(n - 1) + 0.5, minor=True)
        axis.grid(False)
        axis.grid(which="minor", color="white", linewidth=1.5, alpha=1)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set(color="#d0d7de", visible=True)
        axis.set(xlabel="Predicted class", ylabel="True class")
        figure.suptitle(f"{title}\nblue: right, orange: confused; darker: more of the row")
        return png(figure)


def draw_pairs(pairs: Sequence[Sequence[float]], names: Sequence[str], title: str) -> bytes:
    """Draws the first PAIRS of the most confused pairs of classes as bars. Returns a PNG.

    Args:
        pairs: (true class, predicted class, images, share of the true class's images 0 to 1) each.
    """
    shown = list(pairs)[:PAIRS]
    with styled():
        size = (9.2, 1.3 + 0.27 * max(1, len(shown)))
        figure, axis = plt.subplots(figsize=size)
        rows = range(len(shown))
        labels = [
            " → ".join(short(plain_name(names, int(number)), NAME) for number in pair[:2])
            for pair in shown
        ]
        axis.barh(rows, [100 * pair[3] for pair in shown], height=0.6, color=SECOND)
        for row, (_, _, images, share) in enumerate(shown):
            text = f" {images:,} ({100 * share:.0f} %)"
            axis.text(100 * share, row, text, va="center", fontsize=9.5)
        axis.set_yticks(rows, labels)
        axis.set(xlim=(0, 130), xticks=(0, 50, 100), ylim=(max(1, len(shown)) - 0.4, -0.6))
        axis.set_xlabel("True → predicted class: images (% of the true class)")
        axis.grid(axis="y", visible=False)
        if not shown:
            axis.text(65, 0, "no image was taken for another class", ha="center", va="center")
        figure.suptitle(title)
        return png(figure)


def draw_precision_recall(
    precision: np.ndarray, names: Sequence[str], title: str, most: int = 7
) -> bytes:
    """Draws the precision over the recall of each class, and their mean. Returns a PNG.

    Args:
        precision: (C, R) at R recalls from 0 to 1; below 0 for a class without an object.
        most: classes with the lowest mean precision that have a colour and a name.
    """
    there = np.flatnonzero(precision[:, 0] >= 0)
    there = there[np.argsort(precision[there].mean(1), kind="stable")]
    recall = np.linspace(0, 100, precision.shape[1])
    with styled():
        figure, axis = plt.subplots(figsize=(7.4, 4.2))
        axis.set(xlabel="Recall (%)", ylabel="Precision (%)", xlim=(0, 100), ylim=(0, 100))
        for i in there[most:]:
            axis.plot(recall, 100 * precision[i], color="#d0d7de", lw=0.8)
        for i, colour in zip(there[:most], CURVES[1:], strict=False):
            label = f"{short(plain_name(names, i), SIDE_NAME)} {100 * precision[i].mean():.1f}"
            axis.plot(recall, 100 * precision[i], color=colour, label=label, clip_on=False)
        if len(there):
            mean = 100 * precision[there].mean(0)
            label = f"all {len(there)} classes {mean.mean():.1f}"
            axis.plot(recall, mean, color=MAIN, lw=3, label=label, clip_on=False)
            figure.legend(loc="outside right upper", title="AP50 (%), lowest first")
        figure.suptitle(title)
        return png(figure)


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
    bins, there = len(images), images > 0
    middle = 100 * (np.arange(bins) + 0.5)[there] / bins
    right, sure = 100 * accuracy[there], 100 * confidence[there]
    both = np.minimum(right, sure)
    share = 100 * images[there] / max(1, images.sum())
    with styled():
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(5.2, 6.4), sharex=True, height_ratios=(3, 1)
        )
        bar = {"width": 0.94 * 100 / bins}
        upper.bar(middle, both, color=MAIN, label="right predictions", **bar)
        for label, colour, gap in (
            ("underconfident", "#56B4E9", right - sure),
            ("overconfident", "#f0b487", sure - right),
        ):
            upper.bar(middle, gap.clip(0), bottom=both, color=colour, label=label, **bar)
        upper.plot((0, 100), (0, 100), "--", color=GREY, lw=1, label="perfect calibration")
        upper.set(ylabel="Right predictions (%)", ylim=(0, 100), xlim=(0, 100))
        figure.legend(loc="outside lower center", ncols=2)
        lower.bar(middle, share, color="#b6bcc4", **bar)
        lower.set(xlabel="Confidence of the network (%)", ylabel="Images (%)")
        lower.set_ylim(0, min(100, max(1.0, 1.08 * share.max(initial=0))))
        text = f"expected calibration error {100 * error:.2f} %" if there.any() else "no image"
        figure.suptitle(f"{title}\n{text}")
        return png(figure)

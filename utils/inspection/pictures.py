"""Draws predictions: an image with its class-activation map, grids of images, and what a report of
an evaluation shows: confusions, calibration, the images with the highest loss.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from utils.system.style import GREY, MAIN, SECOND, drawable, png, styled
from utils.system.text import printable, short

SIDE = 448  # pixels of a picture's longer side beside its map
CELL = 132  # pixels of a picture in the grid ...
LARGE_CELL = 288  # ... where there are captions in it to be read
TEXT, LINE = 34, 14  # pixels of the two lines below it, and of each further one
COLOURS = LinearSegmentedColormap.from_list("heat", ["#3b0f70", "#b73779", "#fc8961", "#fcfdbf"])
MATRIX = 20  # classes up to which the whole matrix is drawn, with its numbers
PAIRS = 20  # most confused pairs that are drawn
NAME, SIDE_NAME = 30, 16  # characters of a class's name in a table, and beside a matrix
WORST_CELL = 176  # pixels of an image in the grid of the worst
TRUE, PATH = 12, 22  # characters of the true class and of the path below it
RIGHT, WRONG, PLAIN = "#1a7f37", "#cf222e", "#1f2328"


@dataclass(frozen=True)
class Cell:
    """Holds one picture of the grid."""

    image: Image.Image
    label: str
    note: str  # the smaller lines below it, one or more
    colour: str = PLAIN


def seen_square(width: int, height: int, img_size: int, crop_pct: float) -> tuple[float, ...]:
    """Returns what `eval_transform` leaves of an image: (left, top, side) in its own pixels."""
    short = min(width, height)
    side = short * img_size / round(img_size / crop_pct)
    return (width - side) / 2, (height - side) / 2, side


def draw_evidence(image: Image.Image, heat: np.ndarray, square: tuple[float, ...]) -> Image.Image:
    """Returns the image with its class-activation map over it; arguments as in `draw_map`."""
    shown, scale = shown_image(image)
    overlay = _overlay(np.asarray(shown) / 255, heat, [scale * value for value in square])
    return Image.fromarray((255 * overlay).round().astype(np.uint8))


def shown_image(image: Image.Image) -> tuple[Image.Image, float]:
    """Returns an image with a longer side of `SIDE` pixels, and by how much it was scaled."""
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    # Few pixels are shown as pixels: smoothing would invent what the network did not have.
    how = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
    return image.resize(size, how), scale


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
    shown, scale = shown_image(image)
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
        below = {"transform": middle.transAxes, "ha": "center", "va": "top"}
        depth = -0.07 / (3.2 * shown.height / SIDE)
        middle.text(0.5, depth, f"Grad-CAM on {where}", fontsize=8, color="0.4", **below)
        _draw_ranking(right, ranking)
        return png(figure)


def _map_axes(size: Sequence[int], names: Sequence[str]) -> tuple[Figure, tuple[Axes, ...]]:
    """Places, in inches, two pictures of `size` pixels, the colours' scale, and the bars."""
    wide, tall = (3.2 * pixels / SIDE for pixels in size)
    gap, head, foot, bars, least = 0.15, 0.4, 0.3, 1.6, 2.3
    text = 0.2 + 0.075 * max(len(short(name)) for name in names)
    width = gap + 2 * (max(wide, least) + gap) + 0.7 + text + bars + gap
    height = head + max(tall, least) + foot
    figure = plt.figure(figsize=(width, height))

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
    places = range(len(names))
    axis.barh(places, shares, color=["#b73779", *["#b6bcc4"] * (len(names) - 1)], height=0.62)
    for place, share in zip(places, shares, strict=True):
        axis.text(share + 2, place, f"{share:.1f} %", va="center", fontsize=8)
    axis.set(xlim=(0, 140), xticks=(), ylim=(max(4.6, len(names) - 0.4), -0.6))
    axis.set_yticks(places, names, fontsize=8)
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
    seen = warmth >= -0.5
    warmth = warmth.clip(0, 1)
    colour = COLOURS(warmth)[..., :3]
    share = (0.75 * warmth)[..., None]
    return np.where(seen[..., None], grey * (1 - share) + colour * share, 0.3 * grey)


def draw_grid(cells: Sequence[Cell], title: str, side: int = CELL) -> bytes:
    """Returns a PNG of all `cells`, row by row, `side` pixels each, the text below each picture."""
    least = max(1, 4 * CELL // side)  # columns
    columns = min(len(cells), max(least, math.ceil(math.sqrt(1.25 * len(cells)))))
    rows = math.ceil(len(cells) / columns)
    gap, head = 10, 34
    text = TEXT + LINE * max(cell.note.count("\n") for cell in cells)
    font, small = _font("DejaVuSans-Bold.ttf", 14), _font("DejaVuSans.ttf", 11)
    width = max(columns * (side + gap) + gap, 320)
    sheet = Image.new("RGB", (width, head + rows * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, head / 2), _fit(draw, title, small, width - 2 * gap), "#59636e", small, "lm")
    for i, cell in enumerate(cells):
        x = gap + (i % columns) * (side + gap)
        y = head + (i // columns) * (side + text + gap)
        picture = _thumbnail(cell.image, side)
        at = (x + (side - picture.width) // 2, y + (side - picture.height) // 2)
        draw.rectangle((x - 1, y - 1, x + side, y + side), "#f6f8fa")
        sheet.paste(picture, at)
        if cell.colour != PLAIN:
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=cell.colour, width=2)
        centre = x + side / 2
        label = _fit(draw, cell.label, font, side)
        draw.text((centre, y + side + 4), label, cell.colour, font, "ma")
        for line, words in enumerate(cell.note.split("\n")):
            note = _fit(draw, words, small, side)
            draw.text((centre, y + side + 21 + LINE * line), note, "#59636e", small, "ma")
    return encoded(sheet)


def encoded(image: Image.Image) -> bytes:
    """Returns the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _thumbnail(image: Image.Image, most: int) -> Image.Image:
    scale = most / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Returns `text` on one line, with its end cut off if it is wider than `width` pixels."""
    text = printable(text)
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


@dataclass(frozen=True)
class Confusion:
    """Holds one pair of classes that the network confuses."""

    true: int
    found: int
    images: int
    share: float  # of the true class's images, 0 to 1


@dataclass(frozen=True)
class WorstImage:
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
        words.append("perfect calibration")
        figure.legend(handles, words, loc="outside lower center", ncols=2)
        share = 100 * images / max(1, images.sum())
        lower.bar(middle, share[there], color="#b6bcc4", **bar)
        lower.set(xlabel="Confidence of the network (%)", ylabel="Images (%)")
        lower.set_ylim(0, max(1.0, 1.08 * share.max(initial=0)))
        words = f"expected calibration error {100 * error:.2f} %" if there.any() else "no image"
        figure.suptitle(f"{title}\n{words}")
        return png(figure, colours=256)


def draw_worst(images: Sequence[WorstImage], names: Sequence[str], title: str) -> bytes:
    """Draws images with path, true and found class, and the probability of each. Returns a PNG."""
    return draw_grid(
        [_cell(i, image, names) for i, image in enumerate(images, 1)], title, WORST_CELL
    )


def _cell(rank: int, worst: WorstImage, names: Sequence[str]) -> Cell:
    """Makes a picture of the grid. Long names and paths are cut; numbers never are."""
    found, sure = "nothing finite", ""
    if worst.found >= 0:
        found = _plain_name(names, worst.found)
        sure = f"found with {_in_percent(worst.probability)}"
    true = _plain_name(names, worst.true)
    true = true if len(true) <= TRUE else f"{true[: TRUE - 1]}…"
    path = drawable(worst.path, "see worst_images.csv")
    # The end of a path tells more than its beginning, which is the class.
    path = path if len(path) <= PATH else f"…{path[1 - PATH :]}"
    colour = RIGHT if worst.found == worst.true else WRONG
    image = worst.image or Image.new("RGB", (WORST_CELL, WORST_CELL), "#d0d7de")
    lines = (sure, f"true: {true} ({_in_percent(worst.true_probability)})", f"{rank}. {path}")
    return Cell(image, found, "\n".join(lines), colour)


def _plain_name(names: Sequence[str], number: int) -> str:
    """Returns a class's name for Pillow, which reads no formulas."""
    return drawable(printable(names[number]), f"class {number}")


def _in_percent(share: float) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else "-"

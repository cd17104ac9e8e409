"""Draws predictions: one image with its class-activation map, many images in a grid."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image, ImageDraw, ImageFont

from utils.system.picture_style import plt, png, styled
from utils.system.text import printable, short

SIDE = 448  # pixels of a picture's longer side beside its map
CELL = 132  # pixels of a picture in the grid ...
LARGE_CELL = 288  # ... where there are captions in it to be read
TEXT, LINE = 34, 14  # pixels of the two lines below it, and of each further one
COLOURS = LinearSegmentedColormap.from_list("heat", ["#3b0f70", "#b73779", "#fc8961", "#fcfdbf"])
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


def _map_axes(size: Sequence[int], names: Sequence[str]) -> tuple[plt.Figure, tuple[plt.Axes, ...]]:
    """Places, in inches, two pictures of `size` pixels, the colours' scale, and the bars."""
    wide, tall = (3.2 * pixels / SIDE for pixels in size)
    gap, head, foot, bars, least = 0.15, 0.4, 0.3, 1.6, 2.3
    text = 0.2 + 0.075 * max(len(short(name)) for name in names)
    width = gap + 2 * (max(wide, least) + gap) + 0.7 + text + bars + gap
    height = head + max(tall, least) + foot
    figure = plt.figure(figsize=(width, height))

    def axes(x: float, w: float, h: float) -> plt.Axes:
        return figure.add_axes((x / width, (height - head - h) / height, w / width, h / height))

    shift = max(0, least - wide) / 2
    x = 2 * gap + 2 * max(wide, least) - shift
    return figure, (
        axes(gap + shift, wide, tall),
        axes(2 * gap + max(wide, least) + shift, wide, tall),
        axes(x + 0.08, 0.1, tall),
        axes(x + 0.7 + shift + text, bars, max(tall, least)),
    )


def _draw_ranking(axis: plt.Axes, ranking: Sequence[tuple[str, float]]) -> None:
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

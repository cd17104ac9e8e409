"""Gives all diagrams and grids of pictures one style: colours, texts, lines, and PNG files.

matplotlib, which is slow to import, is imported where something is drawn. Pictures have a white
ground of their own, so that they look alike on light and dark pages.
"""

import functools
import io
import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from utils.system.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito: people with any form of colour blindness can tell them apart.
MAIN, SECOND, GREY = "#0072B2", "#D55E00", "#6b7280"
CURVES = (MAIN, SECOND, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5c4b8a", "#000000")
DIFFERENCES = "RdBu_r"  # matplotlib's map of colours around a middle
RIGHT, WRONG, PLAIN = "#1a7f37", "#cf222e", "#1f2328"  # of predictions, and of other text
CELL = 132  # pixels of a picture in a grid ...
MEDIUM_CELL, LARGE_CELL = 176, 288  # ... of few pictures, and where there are captions in them
TEXT, LINE = 34, 14  # pixels of the two lines below it, and of each further one

RIGHT_TO_LEFT = ("R", "AL", "AN")  # not every version of what draws here turns it round

SETTINGS = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "figure.titlesize": 12,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "axes.prop_cycle": f"cycler(color={list(CURVES)})",
}


@contextmanager
def styled() -> Iterator[ModuleType]:
    """Gives the figures that are made in the block the project's style; yields pyplot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = SETTINGS
    with matplotlib.rc_context(settings):
        yield plt


def png(figure: "Figure", colours: int | None = 256) -> bytes:
    """Returns the figure as a PNG file's bytes, and closes it.

    Args:
        colours: at most so many, for a smaller file; None for all.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    release(figure)
    if colours is None:
        return buffer.getvalue()
    image = Image.open(buffer).convert("RGB")
    return encoded(image.quantize(colours, dither=Image.Dither.NONE))


def encoded(image: Image.Image) -> bytes:
    """Returns the image as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # `optimize` saves a twentieth, and takes five to ten times as long
    return buffer.getvalue()


def release(figure: "Figure") -> None:
    """Closes a figure, and frees what it draws.

    A figure refers to itself in a hundred ways. Closed alone it waits for Python's collector, some
    megabytes for each epoch of a run that draws its curves.
    """
    import matplotlib.pyplot as plt

    plt.close(figure)
    figure.clear()


def drawable(text: str, otherwise: str) -> str:
    """Returns `text` where the pictures' font has each of its characters, else `otherwise`.

    The font that matplotlib brings has Latin, Greek and Cyrillic letters, and many symbols; of
    Chinese or Hindi it would draw a row of equal boxes.
    """
    known = _characters()
    legible = all(
        ord(c) in known and unicodedata.bidirectional(c) not in RIGHT_TO_LEFT for c in text
    )
    return text if legible and text.strip() else otherwise


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())


def plain_name(names: Sequence[str], number: int) -> str:
    """Returns a class's name, or its number where the pictures' font lacks a character of it."""
    return drawable(printable(names[number]), f"class {number}")


@dataclass(frozen=True)
class Cell:
    """Holds one picture of the grid."""

    image: Image.Image
    label: str
    note: str  # the smaller lines below it, one or more
    colour: str = PLAIN


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns matplotlib's font, which has more alphabets than Pillow's."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Returns `text` on one line, with its end cut off where it is wider than `width` pixels."""
    text = printable(text)
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def scaled(image: Image.Image, most: int) -> tuple[Image.Image, float]:
    """Returns an image with a longer side of `most` pixels, and by how much it was scaled."""
    scale = most / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    # Few pixels are shown as pixels: smoothing would invent what the network did not have.
    how = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
    return image.resize((width, height), how), scale


def draw_grid(cells: Sequence[Cell], title: str, side: int = CELL) -> bytes:
    """Returns a PNG of all `cells`, row by row, `side` pixels each, the text below each picture."""
    least = max(1, 4 * CELL // side)  # columns
    columns = min(len(cells), max(least, math.ceil(math.sqrt(1.25 * len(cells)))))
    rows = math.ceil(len(cells) / columns)
    columns = math.ceil(len(cells) / rows)  # as many in each row
    gap, head = 10, 34
    text = TEXT + LINE * max(cell.note.count("\n") for cell in cells)
    bold, small = font(14, bold=True), font(11)
    width = max(columns * (side + gap) + gap, 320)
    sheet = Image.new("RGB", (width, head + rows * (side + text + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, head / 2), fit(pen, title, small, width - 2 * gap), "#59636e", small, "lm")
    for i, cell in enumerate(cells):
        x = gap + (i % columns) * (side + gap)
        y = head + (i // columns) * (side + text + gap)
        picture, _ = scaled(cell.image, side)
        pen.rectangle((x - 1, y - 1, x + side, y + side), "#f6f8fa")
        sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        if cell.colour != PLAIN:
            pen.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=cell.colour, width=2)
        centre = x + side / 2
        pen.text((centre, y + side + 4), fit(pen, cell.label, bold, side), cell.colour, bold, "ma")
        for i_line, line in enumerate(cell.note.split("\n")):
            at = (centre, y + side + 21 + LINE * i_line)
            pen.text(at, fit(pen, line, small, side), "#59636e", small, "ma")
    return encoded(sheet)

"""Gives all diagrams one style: sizes of text, lines, and PNG files.

Pictures have a white ground of their own, so that they look alike on light and dark pages.
"""

import functools
import io
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from PIL import Image

from utils.system.colours import CURVES

__all__ = ["SETTINGS", "drawable", "plt", "png", "styled"]

RIGHT_TO_LEFT = ("R", "AL", "AN")  # not every version of what draws here turns it round

SETTINGS = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
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
    "axes.prop_cycle": matplotlib.cycler(color=CURVES),
}


@contextmanager
def styled() -> Iterator[None]:
    """Gives the figures that are made in the block the project's style."""
    with matplotlib.rc_context(SETTINGS):
        yield


def png(figure: plt.Figure, colours: int | None = None) -> bytes:
    """Returns the figure as a PNG file's bytes, and closes it.

    Args:
        colours: at most so many, for a smaller file; None for all.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    release(figure)
    if colours is None:
        return buffer.getvalue()
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


def release(figure: plt.Figure) -> None:
    """Closes a figure, and frees what it draws.

    A figure refers to itself in a hundred ways. Closed alone it waits for Python's collector, some
    megabytes for each epoch of a run that draws its curves.
    """
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
    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())

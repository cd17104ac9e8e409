"""Gives all diagrams one style: colours, sizes of text, lines, and PNG files.

matplotlib, which is slow to import, is imported where something is drawn. Pictures have a white
ground of their own, so that they look alike on light and dark pages.
"""

import functools
import io
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito: people with any form of colour blindness can tell them apart.
MAIN, SECOND, GREY = "#0072B2", "#D55E00", "#6b7280"
CURVES = (MAIN, SECOND, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5c4b8a", "#000000")
DIFFERENCES = "RdBu_r"  # matplotlib's map of colours around a middle

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
    "axes.prop_cycle": f"cycler(color={list(CURVES)})",
}


@contextmanager
def styled() -> Iterator[ModuleType]:
    """Gives the figures that are made in the block the project's style; yields pyplot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(SETTINGS):
        yield plt


def png(figure: "Figure", colours: int | None = None) -> bytes:
    """Returns the figure as a PNG file's bytes, and closes it.

    Args:
        colours: at most so many, for a smaller file; None for all.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    release(figure)
    if colours is None:
        return buffer.getvalue()
    from PIL import Image

    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


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

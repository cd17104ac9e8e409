"""Formats text for people: columns, hints, and names that are safe to show on a terminal."""

import csv
import difflib
import io
import os
import re
from collections.abc import Iterable, Sequence

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters that move a terminal's cursor, or worse

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes a cell for that begins so


def ksize_text(ksize: tuple[int, ...] | None) -> str:
    """Returns kernel sizes as `--ksize` takes them: 3557, or 3,5,5,11 where a size has two digits;
    - for None.
    """
    if ksize is None:
        return "-"
    return ("" if max(ksize) < 10 else ",").join(map(str, ksize))


def columns(rows: Sequence[Sequence[str]], left: int = 1, gap: int = 2) -> str:
    """Returns aligned columns with `gap` between them, the first `left` flush left, the others
    flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * gap).join(cells).rstrip())
    return "\n".join(lines)


def paragraphs(*parts: str) -> str:
    """Returns the parts that are not empty, with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def counted(number: float, noun: str, form: str = "") -> str:
    """Returns a number, formatted by `form`, and its noun: 1 image, 1,200 images, 2 classes."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:{form}} {noun}{ending}"


def all_epochs(number: int) -> str:
    """Returns the subject of a sentence on all epochs of a run, with its verb."""
    return f"all {number} epochs are" if number > 1 else "the one epoch is"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns a hint such as `; did you mean eca_resnet50?`; "" if nothing is close."""
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def printable(path: object) -> str:
    """Returns a path fit for a line of a terminal: bytes that are not UTF-8, and control characters
    such as line breaks, are shown as \\xNN.
    """
    path = path if isinstance(path, str | bytes | os.PathLike) else str(path)
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can hold it
        text = str(path).encode("utf-8", "backslashreplace").decode()
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def printable_lines(text: str) -> str:
    """Returns lines of text fit for a terminal: as `printable`, with their line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def cell(text: object) -> str:
    """Returns a user's text as a cell of a CSV file: shown by a spreadsheet, not computed.

    What begins as a formula does (= + - @, tab, carriage return) gets a ' in front, as spreadsheets
    themselves write such text. Numbers are not passed here: -1 would become text.
    """
    text = str(text)
    return f"'{text}" if text.startswith(FORMULA) else text


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Returns rows as a CSV file's text. Cells of a user's text have been through `cell`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def short(text: str, most: int = 24) -> str:
    """Returns `text` as matplotlib is to draw it: at most `most` characters, and never read as a
    formula or as a label to be hidden (one that begins with "_").
    """
    text = text.replace("$", r"\$")
    text = f"\u200b{text}" if text.startswith("_") else text  # a space of no width
    return text if len(text) <= most else text[: most - 1] + "…"

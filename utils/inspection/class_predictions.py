"""Writes what was predicted for each image, as a table, CSV or JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.system.files import write_atomically
from utils.system.text import cell, printable

FORMATS = ("table", "csv", "json")
WIDEST_PATH = 48  # characters of the table's first column; a longer path pushes its row aside


@dataclass(frozen=True)
class Guess:
    """Holds one class, and how sure the network is of it."""

    index: int
    name: str
    confidence: float  # softmax, 0 to 1


@dataclass(frozen=True)
class Prediction:
    """Holds the most likely classes of one image, best first, or why there are none."""

    file: str
    guesses: tuple[Guess, ...] = ()
    error: str | None = None
    map: str | None = None  # the picture of the class-activation map

    def as_dict(self) -> dict:
        """Returns the prediction as plain values for JSON."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        drawn = {"map": self.map} if self.map else {}
        return {"file": self.file, "guesses": [vars(guess) for guess in self.guesses], **drawn}


class PredictionLog:
    """Shows predictions on standard output as they come, and collects them for files.

    Args:
        form: one of `FORMATS`; JSON, being one list, is shown by `close`.
        files: the paths to come.
        topk: guesses of each.
    """

    def __init__(self, form: str, files: Sequence[str], topk: int):
        self.form, self.topk = form, topk
        self.width = path_width(files)
        self.predictions: list[Prediction] = []
        if form == "csv":
            print(_csv_lines([self._titles()]), end="")

    def add(self, prediction: Prediction) -> None:
        self.predictions.append(prediction)
        if self.form == "csv":
            print(_csv_lines([self._cells(prediction)]), end="", flush=True)
        elif self.form == "table" and prediction.error is None:
            print(f"{prediction.file:<{self.width}}  {_percentages(prediction)}", flush=True)

    def close(self) -> None:
        if self.form == "json":
            print(self._json(), end="")

    def write(self, folder: Path) -> None:
        """Writes predictions.csv and predictions.json to `folder`."""
        rows = [self._titles(), *map(self._cells, self.predictions)]
        write_atomically(folder / "predictions.csv", _csv_lines(rows).encode())
        write_atomically(folder / "predictions.json", self._json().encode())

    def _titles(self) -> list[str]:
        ranks = range(1, self.topk + 1)
        return ["file", *(t for i in ranks for t in (f"class_{i}", f"confidence_{i}")), "error"]

    def _cells(self, prediction: Prediction) -> list[str]:
        cells = [c for g in prediction.guesses for c in (cell(g.name), f"{g.confidence:.6f}")]
        empty = [""] * (2 * self.topk - len(cells))
        return [cell(prediction.file), *cells, *empty, cell(prediction.error or "")]

    def _json(self) -> str:
        return (
            json.dumps([p.as_dict() for p in self.predictions], indent=2, ensure_ascii=False) + "\n"
        )


def path_width(files: Sequence[str]) -> int:
    """Returns the characters of the table's first column."""
    return min(WIDEST_PATH, max(map(len, files), default=0))


def _percentages(prediction: Prediction) -> str:
    return "   ".join(f"{printable(g.name)} {100 * g.confidence:.1f} %" for g in prediction.guesses)


def _csv_lines(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

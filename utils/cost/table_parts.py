"""Holds what the cost tables of classifiers and detectors share: cells, notes and the legend."""

import textwrap
from collections.abc import Sequence
from typing import Protocol

from utils.cost.published import Published

WIDTH = 120  # of running text; the tables are as wide as their numbers
MARK = {True: "yes", False: "no", None: "-"}


class Counted(Protocol):
    """Describes a report on one network."""

    published: Published | None  # None: nothing for these settings

    @property
    def network(self) -> str: ...

    @property
    def params(self) -> str: ...  # counted, in the units and the rounding of `published`

    @property
    def flops(self) -> str: ...


def agrees(report: Counted) -> bool | None:
    """Returns whether our figures, rounded, are the published ones; None where there are none."""
    printed = report.published
    if printed is None:
        return None
    return printed.params == report.params and printed.flops in (None, report.flops)


def beside(report: Counted) -> list[str]:
    """Returns five cells: published parameters and FLOPs, ours, and whether they agree."""
    printed = report.published
    theirs = [printed.params, printed.flops or "-"] if printed else ["-", "-"]
    return [*theirs, report.params, report.flops, MARK[agrees(report)]]


def disagreements(reports: Sequence[Counted]) -> str:
    """Returns a paragraph on reports that differ from the published figures, or an empty string."""
    lines = []
    for report in reports:
        if agrees(report) is not False:
            continue
        printed = report.published
        said = "; ".join(
            f"published {theirs} {what}, counted {ours}"
            for what, theirs, ours in (
                ("parameters", printed.params, report.params),
                ("FLOPs", printed.flops, report.flops),
            )
            if theirs not in (None, ours)
        )
        note = f"{report.network}: {said}" + (f": {printed.remark}" if printed.remark else "")
        lines.append(textwrap.fill(f"  {note}.", WIDTH, subsequent_indent="    "))
    return "\n".join(["Where published and counted do not agree:", *lines]) if lines else ""


def size_text(size: tuple[int, int]) -> str:
    """Returns height and width, such as 800x1280."""
    return f"{size[0]}x{size[1]}"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Returns what each column is: the titles flush left, the text wrapped beside them."""
    margin = max(len(title) for title, _ in entries) + 2
    return "\n".join(
        textwrap.fill(
            text, WIDTH, initial_indent=title.ljust(margin), subsequent_indent=" " * margin
        )
        for title, text in entries
    )

"""Draws curves over the epochs as SVG inside an HTML page, in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.inspection.html_page import text
from utils.system.colours import CURVES, GREY

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34  # pixels around the diagram
DECADES = 20  # times: a span of losses from which on the axis is logarithmic, as in curves.png
LARGEST = 1e30  # a value beyond it, or one that is no number, is not drawn
DOTS = 40  # epochs up to which each one has a dot


@dataclass(frozen=True)
class Line:
    """Holds one curve: (epoch, value) pairs, and what it is called; None for no name."""

    points: Sequence[tuple[float, float]]
    label: str | None
    colour: str | None  # of utils.system.colours; None for that of its place


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float  # pixels of `low` ...
    end: float  # ... and of `high`
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(title: str, unit: str, lines: Sequence[Line], best: int | None, can_be_log: bool) -> str:
    """Returns one diagram with its heading and key, as HTML.

    Args:
        best: the epoch that is marked.
        can_be_log: the values may span so much that the axis is better logarithmic.
    """
    lines = [
        Line([p for p in line.points if abs(p[1]) < LARGEST], line.label, line.colour)
        for line in lines
    ]
    colours = [_colour(line.colour, i) for i, line in enumerate(lines)]
    keys = "".join(
        f'<span class="key" style="--key: var({colour})">{text(line.label)}{_last(line)}</span>'
        for line, colour in zip(lines, colours, strict=True)
        if line.label is not None
    )
    drawn = [line for line in lines if line.points]
    if not drawn:
        return f'<div class="chart"><h3>{text(title)}</h3><p class="soft">no finite value</p></div>'
    epochs = [x for line in drawn for x, _ in line.points]
    values = [y for line in drawn for _, y in line.points]
    log = can_be_log and min(values) > 0 and max(values) > DECADES * min(values)
    y, ticks = _value_axis(min(values), max(values), log)
    low, high = min(epochs), max(epochs)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    x = Axis(low, high, LEFT, WIDTH - RIGHT)
    parts = [_grid(x, y, ticks, _whole_ticks(low, high))]
    if best is not None and low <= best <= high:
        at = f"{x.at(best):.1f}"
        parts.append(
            f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            'style="stroke: var(--k8)" stroke-dasharray="2 3"/>'
        )
    parts += [_curve(line, x, y, colour) for line, colour in zip(lines, colours, strict=True)]
    label = f"{title}, {unit}, over {len(set(epochs))} epochs"
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}" '
        f'font-size="11" fill="currentColor">{"".join(parts)}</svg>'
    )
    head = f'<h3>{text(title)} <span class="soft">{text(unit)}</span></h3>'
    return f'<div class="chart">{head}<div class="keys">{keys}</div>{svg}</div>'


def _curve(line: Line, x: Axis, y: Axis, colour: str) -> str:
    places = [(x.at(a), y.at(b)) for a, b in line.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    parts = [
        f'<polyline points="{path}" fill="none" stroke-width="1.75" stroke-linejoin="round" '
        f'style="stroke: var({colour})"/>'
    ]
    if len(places) <= DOTS:
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" style="fill: var({colour})"/>'
            for a, b in places
        ]
    return "".join(parts)


def _grid(x: Axis, y: Axis, rows: Sequence[float], columns: Sequence[int]) -> str:
    """Returns lines and numbers of the axes."""
    parts = []
    for value in rows:
        at = y.at(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
            'style="stroke: var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for epoch in columns:
        parts.append(
            f'<text x="{x.at(epoch):.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="middle">{epoch}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle" '
        'style="fill: var(--soft)">Epoch</text>'
    )
    return "".join(parts)


def _value_axis(low: float, high: float, log: bool) -> tuple[Axis, list[float]]:
    """Returns the axis of the values, and where it has numbers."""
    span = (HEIGHT - BOTTOM, TOP)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        few = last - first <= 2
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in ((1, 2, 5) if few else (1,))]
        return Axis(low / 1.1, high * 1.1, *span, log=True), [
            t for t in ticks if low / 1.1 <= t <= high * 1.1
        ]
    # Values that are all but equal still get an axis with two ends.
    step = _step(max(high - low, 1e-6 * abs(high)) if high != low else abs(high) or 1.0, 5)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step
    count = round((high - low) / step)
    return Axis(low, high, *span), [low + i * step for i in range(count + 1)]


def _whole_ticks(low: float, high: float) -> list[int]:
    """Returns at most about eight epochs for the numbers below the diagram."""
    step = max(1, math.ceil(_step(high - low, 7)))
    first, last = math.ceil(low), math.floor(high)
    return list(range(-(-first // step) * step, last + 1, step)) or [first]


def _step(span: float, parts: int) -> float:
    """Returns 1, 2 or 5 times a power of ten that divides a span into about so many parts."""
    rough = span / parts
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _last(line: Line) -> str:
    return f" {line.points[-1][1]:.4g}" if line.points else ""


def _colour(name: str | None, place: int) -> str:
    """Returns the page's variable for a colour of the diagrams."""
    if name == GREY:
        return "--k8"
    return f"--k{CURVES.index(name) if name in CURVES else place % len(CURVES)}"

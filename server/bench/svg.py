"""Panels of lines and points on linear or logarithmic axes as one SVG file, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 40, 48
HEAD, LEGEND = 34, 26
# Okabe and Ito's colours, told apart by most colour-blind readers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True, slots=True)
class Axis:
    """low: where a linear axis begins if no value is below it. A logarithmic axis leaves out values that are not
    above 0."""

    title: str
    log: bool = False
    low: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """points: x, y. labels: beside the points, if there are any. line: whether the points are joined."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = COLORS[0]
    dashed: bool = False
    line: bool = True
    markers: bool = True
    labels: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """limits: y values of dashed horizontal lines, with their names."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    limits: Sequence[tuple[float, str]] = field(default=())


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover low to high, both above 0, powers alone over three decades: the first
    at or below, the last at or above."""
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [m * 10.0**e for e in range(first, last + 1) for m in factors]
    return _covering(steps, low * (1 + 1e-9), high * (1 - 1e-9))


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover low to high."""
    # What differs in the last digits only is the same.
    width = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else abs(high) or 1.0
    raw = width / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    return _covering([step * n for n in range(first, first + 10)], low + 1e-6 * step, high - 1e-6 * step)


def _covering(steps: list[float], low: float, high: float) -> list[float]:
    first = max((i for i, step in enumerate(steps) if step <= low), default=0)
    last = min((i for i, step in enumerate(steps) if step >= high), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def figure(panels: Sequence[Panel], title: str, columns: int = 2, notes: Sequence[str] = ()) -> str:
    """The SVG's text: panels from left to right and top to bottom, one legend for all, notes at the foot."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    named = {one.name: one for panel in panels for one in panel.series if one.name}
    legend = LEGEND if named else 0
    width, height = columns * WIDTH, HEAD + legend + rows * HEIGHT + 16 * len(notes) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 22, title, 'text-anchor="middle" font-size="15"'),
    ]
    at = 20.0
    for one in named.values():
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<path d="M{at:.0f} {HEAD + 10}h22" stroke="{one.color}" stroke-width="2"{dash}/>')
        parts.append(_text(at + 28, HEAD + 14, one.name))
        at += 48 + 6.6 * len(one.name)
    for number, panel in enumerate(panels):
        x, y = number % columns * WIDTH, HEAD + legend + number // columns * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    for number, note in enumerate(notes):
        parts.append(_text(12, height - 12 - 16 * (len(notes) - 1 - number), note, 'fill="#555" font-size="11"'))
    return "\n".join([*parts, "</svg>", ""])


class _Scale:
    """From an axis's values to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        usable = [value for value in values if not axis.log or value > 0]
        low, high = (min(usable), max(usable)) if usable else (1.0, 2.0)
        if axis.low is not None and not axis.log:
            low = min(low, axis.low)
        self.ticks = log_ticks(low, high) if axis.log else linear_ticks(low, high)
        self._log, self._start, self._end = axis.log, start, end

    def __call__(self, value: float) -> float:
        of = math.log if self._log else float
        first, last = of(self.ticks[0]), of(self.ticks[-1])
        return round(self._start + (of(value) - first) / (last - first) * (self._end - self._start), 1)


def _panel(panel: Panel) -> list[str]:
    points = [point for one in panel.series for point in one.points]
    x_of = _Scale(panel.x, [x for x, _ in points], LEFT, WIDTH - RIGHT)
    limits = [limit for limit, _ in panel.limits]
    y_of = _Scale(panel.y, [*(y for _, y in points), *limits], HEIGHT - BOTTOM, TOP)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        _text(WIDTH / 2, TOP - 14, panel.title, 'text-anchor="middle" font-size="13"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, panel.x.title, 'text-anchor="middle"'),
        _text(14, middle, panel.y.title, f'text-anchor="middle" transform="rotate(-90 14 {middle})"'),
    ]
    for tick in x_of.ticks:
        parts.append(f'<path d="M{x_of(tick)} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(_text(x_of(tick), HEIGHT - BOTTOM + 16, _number(tick), 'text-anchor="middle"'))
    for tick in y_of.ticks:
        parts.append(f'<path d="M{LEFT} {y_of(tick)}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y_of(tick) + 4, _number(tick), 'text-anchor="end"'))
    for limit, name in panel.limits:
        parts.append(f'<path d="M{LEFT} {y_of(limit)}H{WIDTH - RIGHT}" stroke="#b00" stroke-dasharray="2 3"/>')
        parts.append(_text(WIDTH - RIGHT, y_of(limit) - 5, name, 'text-anchor="end" fill="#b00"'))
    for one in panel.series:
        shown = [(x, y) for x, y in one.points if (not panel.x.log or x > 0) and (not panel.y.log or y > 0)]
        placed = [(x_of(x), y_of(y)) for x, y in shown]
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        if one.line and len(placed) > 1:
            path = "L".join(f"{x} {y}" for x, y in placed)
            parts.append(f'<path d="M{path}" fill="none" stroke="{one.color}" stroke-width="1.6"{dash}/>')
        if one.markers:
            radius = 3.2 if one.line else 1.8
            parts += [f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{one.color}"/>' for x, y in placed]
        for (x, y), label in zip(placed, one.labels, strict=False):
            parts.append(_text(x + 7, y - 7, label))
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _text(x: float, y: float, content: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(content)}</text>'

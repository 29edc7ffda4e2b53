"""A plot of labelled points on two logarithmic axes as an SVG file, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 50, 60


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover low to high, both above 0; the first at or below, the last at or
    above."""
    steps = [
        m * 10.0**e for e in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    steps.append(10.0 ** (math.floor(math.log10(high)) + 1))
    first = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = min(i for i, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[first : max(last, first + 1) + 1]


def scatter(
    points: Sequence[tuple[float, float, str]], title: str, x_title: str, y_title: str, limit: tuple[float, str]
) -> str:
    """The SVG's text. points: x, y (both above 0) and label; limit: the y of a dashed line, and its name."""
    x_ticks = ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    y_values = [*(y for _, y, _ in points), limit[0]]
    y_ticks = ticks(min(y_values), max(y_values))

    def place(value: float, over: Sequence[float], start: float, end: float) -> float:
        share = (math.log(value) - math.log(over[0])) / (math.log(over[-1]) - math.log(over[0]))
        return round(start + share * (end - start), 1)

    def x_of(value: float) -> float:
        return place(value, x_ticks, LEFT, WIDTH - RIGHT)

    def y_of(value: float) -> float:
        return place(value, y_ticks, HEIGHT - BOTTOM, TOP)

    def text(x: float, y: float, content: str, more: str = 'text-anchor="middle"') -> str:
        return f'<text x="{x}" y="{y}" {more}>{escape(content)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 24, title, 'text-anchor="middle" font-size="14"'),
        text(WIDTH / 2, HEIGHT - 14, x_title),
        text(18, HEIGHT / 2, y_title, f'text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})"'),
    ]
    for tick in x_ticks:
        parts.append(f'<path d="M{x_of(tick)} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(text(x_of(tick), HEIGHT - BOTTOM + 18, f"{tick:g}"))
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y_of(tick)}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y_of(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    dashes = 'stroke="#b00" stroke-dasharray="6 4"'
    parts.append(f'<path d="M{LEFT} {y_of(limit[0])}H{WIDTH - RIGHT}" {dashes}/>')
    parts.append(text(WIDTH - RIGHT, y_of(limit[0]) - 6, limit[1], 'text-anchor="end" fill="#b00"'))
    path = "L".join(f"{x_of(x)} {y_of(y)}" for x, y, _ in sorted(points))
    parts.append(f'<path d="M{path}" fill="none" stroke="#36c"/>')
    for x, y, label in points:
        parts.append(f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="4" fill="#36c"/>')
        parts.append(text(x_of(x) + 7, y_of(y) - 7, label, 'text-anchor="start"'))
    return "\n".join([*parts, "</svg>", ""])

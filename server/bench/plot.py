"""One run as a picture: when tokens came, how long first tokens took as time went by, and the distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.bench.measure import Run
from server.bench.summary import Limits, tokens_per_event
from server.bench.svg import COLORS, Axis, Panel, Series, figure

_BINS = 60
_STEPS = 200


def draw(run: Run, limits: Limits, title: str, notes: Sequence[str]) -> str:
    """The SVG's text."""
    completed = [record for record in run.records if record.completed and 0 <= record.scheduled < run.seconds]
    firsts = [(record.scheduled, 1e3 * record.first) for record in completed if record.first is not None]
    gaps = [1e3 * gap for record in completed for gap in record.gaps]
    ttft_limit = [] if limits.ttft is None else [(1e3 * limits.ttft, "limit")]
    seconds = Axis("seconds", low=0)
    panels = [
        Panel("output tokens a second", seconds, Axis("tokens/s", low=0), [Series("", token_rate(run), markers=False)]),
        Panel(
            "time to first token, by scheduled arrival",
            seconds,
            Axis("ms", log=True),
            [Series("", firsts, COLORS[1], line=False)],
            ttft_limit,
        ),
        Panel(
            "time to first token",
            Axis("ms", log=True),
            Axis("share of requests", low=0),
            [Series("", distribution([value for _, value in firsts]), COLORS[1], markers=False)],
        ),
        Panel(
            "inter-token time",
            Axis("ms", log=True),
            Axis("share of gaps", low=0),
            [Series("", distribution(gaps), COLORS[2], markers=False)],
        ),
    ]
    return figure(panels, title, 2, notes)


def distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """The share of values up to each of at most 200 of them, from the smallest to the largest."""
    ordered = sorted(values)
    if not ordered:
        return []
    ranks = sorted({math.ceil(len(ordered) * step / _STEPS) for step in range(1, _STEPS + 1)})
    return [(ordered[rank - 1], rank / len(ordered)) for rank in ranks]


def token_rate(run: Run) -> list[tuple[float, float]]:
    """Output tokens a second in each of 60 equal parts of the measured time, at its middle."""
    width = run.seconds / _BINS
    tokens = [0.0] * _BINS
    for record in run.records:
        weight = tokens_per_event(record)
        for at in record.times:
            if 0 <= at < run.seconds:
                tokens[min(_BINS - 1, int(at / width))] += weight
    return [(width * (n + 0.5), count / width) for n, count in enumerate(tokens)]

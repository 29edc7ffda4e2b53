"""The comparison's samples as tables: medians, spreads, and the ratio to the best peer of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from loadtests.peers.compare import CELLS, HTTP_CLIENTS, Entry, HttpEntry

Row = dict[str, object]
OURS = "stet"


def spread(values: Sequence[float]) -> float:
    """Half the distance between the extremes as a share of the median."""
    return (max(values) - min(values)) / 2 / median(values)


def engine_rows(model: str, entries: Mapping[str, Entry]) -> list[Row]:
    """One row for each cell: tokens a second of every contestant; and what of a decode step is Python's, where it is
    known: milliseconds."""
    rows: list[Row] = []
    for cell in CELLS:
        samples = {name: entry.samples[cell] for name, entry in entries.items() if cell in entry.samples}
        kind, batch = cell
        what = f"prefill, {batch} × 512" if kind == "prefill" else f"decode, batch {batch}"
        rows.append({"model": model, "tokens/s": what, **_compared(samples, higher_is_better=True)})
    for cell in CELLS:
        host = {name: [1000 * s for s in entry.host[cell]] for name, entry in entries.items() if cell in entry.host}
        if host:
            what = f"Python's part of a step, ms, decode, batch {cell[1]}"
            rows.append({"model": model, "tokens/s": what, **_compared(host, higher_is_better=False)})
    return rows


def http_rows(model: str, entries: Mapping[str, HttpEntry]) -> list[Row]:
    """Rates, times to the first token in milliseconds, and the two start-up times."""
    rows: list[Row] = []
    for clients in HTTP_CLIENTS:
        samples = {name: entry.rates[clients] for name, entry in entries.items() if clients in entry.rates}
        what = f"tokens/s, {clients} clients"
        rows.append({"model": model, "over HTTP": what, **_compared(samples, higher_is_better=True)})
    for clients in HTTP_CLIENTS:
        samples = {
            name: [1000 * second for second in entry.first[clients]]
            for name, entry in entries.items()
            if clients in entry.first
        }
        what = f"median TTFT, ms, {clients} clients"
        rows.append({"model": model, "over HTTP": what, **_compared(samples, higher_is_better=False)})
    for number, what in enumerate(("ready after, s, first start", "ready after, s, second start")):
        starts = {name: [entry.ready[number]] for name, entry in entries.items() if len(entry.ready) > number}
        rows.append({"model": model, "over HTTP": what, **_compared(starts, higher_is_better=False)})
    return rows


def _compared(samples: Mapping[str, Sequence[float]], *, higher_is_better: bool) -> Row:
    """Median and spread of each contestant, the best peer, and how ours compares: a ratio of medians."""
    row: Row = {}
    for name, values in samples.items():
        shown = f"{median(values):.0f}" if median(values) >= 100 else f"{median(values):.3g}"
        row[name] = f"{shown} ± {100 * spread(values):.0f} %" if len(values) > 1 else shown
    peers = {name: median(values) for name, values in samples.items() if name != OURS}
    if peers:
        best = (max if higher_is_better else min)(peers, key=lambda name: peers[name])
        row["best peer"] = best
        if OURS in samples:
            row["stet / best"] = f"{median(samples[OURS]) / peers[best]:.2f}"
    return row


def table(rows: Sequence[Row]) -> str:
    """Markdown, with a dash where a contestant has no number."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    # The verdict stands at the end, whichever row brought a contestant first.
    header = [name for name in header if name not in ("best peer", "stet / best")]
    header += [name for name in ("best peer", "stet / best") if any(name in row for row in rows)]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(row.get(name, "–")) for name in header) + " |" for row in rows]
    return "\n".join(lines)

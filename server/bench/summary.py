"""What a run comes to: percentiles, rates, goodput, and whether the client can be believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from server.bench.measure import Health, Record, Run

PERCENTILES = (0.5, 0.9, 0.95, 0.99)
# Above these the client is not trusted. A timer of the event loop is up to a millisecond late by itself.
MAX_CPU_SHARE = 0.8
MAX_LAG_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep for its tokens to count as goodput, in seconds; None: no limit. itl: of the 99th
    percentile of the request's own inter-token times. tpot: of its time per output token."""

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None

    def kept_by(self, record: Record) -> bool:
        """Whether a request completed within all of them. A time that it does not have keeps its limit."""
        gaps = record.gaps
        pairs = (
            (record.first, self.ttft),
            (percentile(gaps, 0.99) if gaps else None, self.itl),
            (record.per_token, self.tpot),
        )
        return record.completed and all(v is None or limit is None or v <= limit for v, limit in pairs)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed. Raises ValueError without values."""
    if not values:
        raise ValueError("no percentile of nothing")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """count, mean, percentiles and max; of nothing, only the count."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    found = {f"p{share * 100:g}": ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in PERCENTILES}
    mean = sum(ordered) / len(ordered)
    return {"count": len(ordered), "mean": mean, **found, "max": ordered[-1]}


def summarize(run: Run, limits: Limits) -> dict[str, Any]:
    """The run as JSON values; times in seconds.

    Latencies are those of the requests that were due in the measured time and completed; rates count what came in that
    time, whenever it was asked for.
    """
    due = [record for record in run.records if 0 <= record.scheduled < run.seconds]
    completed = [record for record in due if record.completed]
    good = [record for record in completed if limits.kept_by(record)]
    ended = [record for record in run.records if record.completed and 0 <= record.ended < run.seconds]
    failed = [record for record in due if not record.completed and not record.refused]
    return {
        "seconds": round(run.seconds, 3),
        "requests": {
            "due": len(due),
            "completed": len(completed),
            "refused": sum(record.refused for record in due),
            "failed": len(failed),
            "errors": dict(Counter(record.error or "" for record in due if not record.completed).most_common(5)),
            "finish_reasons": dict(Counter(str(record.finish_reason) for record in completed)),
        },
        "rates": {
            "offered_requests_per_s": len(due) / run.seconds,
            "requests_per_s": len(ended) / run.seconds,
            "output_tokens_per_s": output_tokens(run.records, 0.0, run.seconds) / run.seconds,
            "prompt_tokens_per_s": sum(record.usage.prompt_tokens for record in ended) / run.seconds,
            "goodput_requests_per_s": len(good) / run.seconds,
            "good_share": len(good) / len(due) if due else 0.0,
        },
        "latency_s": {
            "ttft": spread(record.first for record in completed if record.first is not None),
            "inter_token": spread(gap for record in completed for gap in record.gaps),
            "per_output_token": spread(record.per_token for record in completed if record.per_token is not None),
            "whole_request": spread(record.ended - record.scheduled for record in completed),
        },
        "lengths": {
            "prompt_tokens": spread(record.usage.prompt_tokens for record in completed),
            "output_tokens": spread(record.usage.completion_tokens for record in completed),
            "cached_prompt_share": _share(
                sum(record.usage.cached_tokens for record in completed),
                sum(record.usage.prompt_tokens for record in completed),
            ),
            "tokens_per_event": _share(
                sum(record.usage.completion_tokens for record in completed),
                sum(len(record.times) for record in completed),
            ),
        },
        "client": client_health(run.health, [record.sent - record.scheduled for record in due]),
    }


def output_tokens(records: Iterable[Record], begin: float, end: float) -> float:
    """Output tokens that came from `begin` to `end`. An event counts as its request's tokens over its events: a token
    that is not yet text has no event of its own, and events of a slow reader merge."""
    return sum(tokens_per_event(record) * sum(begin <= at < end for at in record.times) for record in records)


def tokens_per_event(record: Record) -> float:
    """By the server's count of tokens; 1 where there is none, or before any event."""
    return (
        record.usage.completion_tokens / len(record.times) if record.usage.completion_tokens and record.times else 1.0
    )


def client_health(health: Health, late: Sequence[float]) -> dict[str, Any]:
    """The client's own figures, and in words what they mean for the others. late: sent after it was due, in seconds."""
    cpu_share = health.cpu / health.wall if health.wall else 0.0
    lag = percentile(health.lags, 0.99) if health.lags else 0.0
    sent_late = percentile(late, 0.99) if late else 0.0
    warnings = []
    if cpu_share > MAX_CPU_SHARE:
        warnings.append(
            f"the client itself was the limit: it used {cpu_share:.0%} of a processor; offer less, or run several"
        )
    elif max(lag, sent_late) > MAX_LAG_SECONDS:
        warnings.append(
            f"the client was up to {1e3 * max(lag, sent_late):.0f} ms late (p99) with only {cpu_share:.0%} of a "
            "processor used: others on this machine, perhaps the server, had the processor; the times include that"
        )
    return {
        "cpu_share": cpu_share,
        "waited_for_a_processor_s": health.waited,
        "loop_lag_p99_s": lag,
        "loop_lag_max_s": max(health.lags, default=0.0),
        "sent_late_p99_s": sent_late,
        "sent_late_max_s": max(late, default=0.0),
        "warnings": warnings,
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def table(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    requests, rates, lengths = summary["requests"], summary["rates"], summary["lengths"]
    lines = [
        f"  requests    {requests['due']} due in {summary['seconds']:g} s, {requests['completed']} completed, "
        f"{requests['refused']} refused, {requests['failed']} failed",
        *(f"              {count} × {text}" for text, count in requests["errors"].items()),
        f"  lengths     {_tokens(lengths['prompt_tokens'])} prompt tokens, {_tokens(lengths['output_tokens'])} output "
        f"tokens (mean), {lengths['cached_prompt_share'] or 0:.0%} of the prompts cached",
        f"  throughput  {rates['output_tokens_per_s']:.1f} output tokens/s, {rates['requests_per_s']:.2f} requests/s "
        f"({rates['offered_requests_per_s']:.2f} offered)",
        f"  goodput     {rates['goodput_requests_per_s']:.2f} requests/s, {rates['good_share']:.1%} of those due",
        "",
        f"  {'ms':<24}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p95", "p99", "max")),
    ]
    names = {
        "ttft": "time to first token",
        "inter_token": "inter-token time",
        "per_output_token": "time per output token",
        "whole_request": "whole request",
    }
    for key, name in names.items():
        figures = summary["latency_s"][key]
        cells = [figures.get(column) for column in ("mean", "p50", "p90", "p95", "p99", "max")]
        lines.append(f"  {name:<24}" + "".join(f"{_ms(cell):>10}" for cell in cells))
    client = summary["client"]
    waited = client["waited_for_a_processor_s"]
    lines += [
        "",
        f"  client      {client['cpu_share']:.1%} of a processor, sent {_ms(client['sent_late_p99_s'])} ms late and "
        f"{_ms(client['loop_lag_p99_s'])} ms of lag at the 99th percentile"
        + ("" if waited is None else f", waited {waited:.2f} s for a processor"),
        *(f"  warning     {text}" for text in client["warnings"]),
    ]
    return "\n".join(lines)


def _tokens(figures: dict[str, float]) -> str:
    return f"{figures['mean']:.0f}" if figures["count"] else "–"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.2f}"

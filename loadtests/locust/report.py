"""What a run came to: which thresholds it kept, and a page in Markdown that names the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from locust.stats import RequestStats, StatsEntry

from loadtests.locust.scenarios import Thresholds

# Locust keeps two digits of a time: what is far below a second is recorded in millionths of one.
MICRO = 1000.0
WHOLE, TTFT, ITL, TPOT, RATE, REFUSED = "SSE", "TTFT, ms", "inter-token, µs", "per token, µs", "tokens/s", "429, ms"
PROMPT, CACHED = "prompt tokens", "cached tokens"
KINDS = (WHOLE, TTFT, ITL, TPOT, RATE, REFUSED, PROMPT, CACHED)


def failures(stats: RequestStats, thresholds: Thresholds) -> list[str]:
    """What was not kept, in words; empty if all was."""
    found = []

    def entry(kind: str) -> StatsEntry:
        return stats.get(thresholds.of, kind)

    whole = [one for (_, kind), one in stats.entries.items() if kind == WHOLE]
    # Locust counts a failed request among the requests too.
    sent, failed = sum(one.num_requests for one in whole), sum(one.num_failures for one in whole)
    refused = sum(one.num_requests for (_, kind), one in stats.entries.items() if kind == REFUSED)
    if entry(WHOLE).num_requests - entry(WHOLE).num_failures == 0:
        found.append(f"no {thresholds.of} request completed")
    if sent and failed / sent > thresholds.failures:
        found.append(f"{failed} of {sent} requests failed: at most {thresholds.failures:.1%} may")
    if thresholds.refused is not None and refused and refused / (sent + refused) > thresholds.refused:
        found.append(f"{refused} of {sent + refused} requests were refused: at most {thresholds.refused:.1%} may be")
    for kind, limit, unit in ((TTFT, thresholds.ttft_p99, 1.0), (ITL, thresholds.itl_p99, MICRO)):
        if limit is not None and entry(kind).num_requests:
            value = entry(kind).get_response_time_percentile(0.99) / unit
            if value > limit:
                what = kind.split(",")[0]
                found.append(f"the 99th percentile of {what} of {thresholds.of} is {value:g} ms: at most {limit:g}")
    if thresholds.cached is not None:
        prompt, cached = entry(PROMPT).total_response_time, entry(CACHED).total_response_time
        if not prompt or cached / prompt < thresholds.cached:
            share = cached / prompt if prompt else 0.0
            found.append(f"{share:.0%} of the prompt tokens came from the cache: at least {thresholds.cached:.0%} must")
    return found


def markdown(
    stats: RequestStats,
    heading: Mapping[str, object],
    machine: Mapping[str, object],
    server: Mapping[str, Any] | None,
    broken: list[str],
) -> str:
    """The page: the scenario, the machine, the server's own words, the statistics, the verdict."""
    lines = [f"# Load test: {heading['scenario']}", ""]
    lines += [f"- {key}: {value}" for key, value in heading.items()]
    lines += ["", "Machine of the client:", "", *(f"- {key}: {value}" for key, value in machine.items())]
    if server:
        lines += ["", "Server:", "", *(f"- {key}: {_short(value)}" for key, value in server.items())]
    lines += [
        "",
        "| behaviour | what | count | mean | p50 | p90 | p99 | max |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, kind), entry in sorted(stats.entries.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1]))):
        what, unit = (f"{kind.split(',')[0]}, ms", MICRO) if kind.endswith("µs") else (kind, 1.0)
        what = "whole request, ms" if kind == WHOLE else what
        values = [entry.avg_response_time, *(entry.get_response_time_percentile(share) for share in (0.5, 0.9, 0.99))]
        cells = [f"{value / unit:.4g}" for value in [*values, entry.max_response_time]]
        lines.append(f"| {name} | {what} | {entry.num_requests} | " + " | ".join(cells) + " |")
    errors = [f"- {error.occurrences} × {error.name}: {error.error}" for error in stats.errors.values()]
    lines += ["", *errors, *([""] if errors else [])]
    lines += ["All thresholds were kept." if not broken else "Not kept:", *(["", *(f"- {one}" for one in broken)])]
    return "\n".join(lines).rstrip() + "\n"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""What HTTP costs: events a second of server time, and the latency from the engine's send to the client's receipt.

The engine is `loadtests.null_engine`, whose tokens carry the time at which they were sent. The client is this process;
the server is a process of its own, whose processor time is read from /proc.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loadtests.null_engine import seconds_since
from loadtests.processes import RunningServer, running_server
from server.bench.client import Target, exchange

SERVER = (sys.executable, "-m", "loadtests.null_server")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def stream(server: RunningServer, num_tokens: int, latencies: list[float] | None) -> int:
    """One streamed request. Returns the events seen; with `latencies`, one entry for each token but the first.

    Raises RuntimeError if it is not answered with 200.
    """
    request = {"prompt": "a", "max_new_tokens": num_tokens, "stream": True, "ignore_eos": True}
    body = json.dumps(request | ({"return_token_ids": True} if latencies is not None else {})).encode()
    target = Target(server.host, server.port, server.host)
    events = 0

    def on_event(data: bytes, came: float) -> bool:
        nonlocal events
        events += data != b"[DONE]"
        if latencies is not None and b'"token_ids"' in data and events > 1:
            # The engine's clock is time.monotonic().
            now = time.monotonic() - (time.perf_counter() - came)
            latencies.extend(seconds_since(tick, now) for tick in json.loads(data)["token_ids"])
        return False

    reply = await exchange(target, target.request("POST", "/generate", body), on_event)
    if reply.status != 200:
        raise RuntimeError(f"the server answered {reply.status}")
    return events


async def _streams(server: RunningServer, count: int, num_tokens: int, latencies: list[float] | None) -> int:
    return sum(await asyncio.gather(*(stream(server, num_tokens, latencies) for _ in range(count))))


def measure(num_streams: int, step_seconds: float, num_tokens: int) -> dict[str, float]:
    """Streams that get a token every `step_seconds`: events a second of the server's own processor time, and the time
    from the engine's send to the client's receipt, in seconds.

    The steps are paced: with an engine that never waits, what a reader has not taken yet merges into one event.
    """
    os.environ["STET_NULL_STEP_SECONDS"] = str(step_seconds)
    try:
        with running_server(command=SERVER) as server:
            server.wait_ready()
            asyncio.run(_streams(server, num_streams, 20, None))
            latencies: list[float] = []
            cpu, started = cpu_seconds(server.process.pid), time.perf_counter()
            events = asyncio.run(_streams(server, num_streams, num_tokens, latencies))
            elapsed, cpu = time.perf_counter() - started, cpu_seconds(server.process.pid) - cpu
    finally:
        del os.environ["STET_NULL_STEP_SECONDS"]
    latencies.sort()
    return {
        "events_per_s": events / elapsed,
        "events_per_cpu_s": events / cpu,
        "median": statistics.median(latencies),
        "p99": latencies[int(0.99 * len(latencies))],
    }


def bench_http(rounds: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """One row for each number of streams; the medians of `rounds` runs."""
    rows: list[dict[str, object]] = []
    for num_streams, step_seconds in ((1, 0.005), (32, 0.01), (256, 0.05)):
        runs = [measure(num_streams, step_seconds, 200) for _ in range(rounds)]
        figure = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append(
            {
                "what": f"{num_streams} streams, a step every {step_seconds * 1000:.0f} ms",
                "events_per_s": round(figure["events_per_s"]),
                "events_per_cpu_s": round(figure["events_per_cpu_s"]),
                "added_latency_median_ms": round(figure["median"] * 1000, 2),
                "added_latency_p99_ms": round(figure["p99"] * 1000, 2),
            }
        )
        say(f"{num_streams} streams: {figure['median'] * 1000:.2f} ms median, {figure['p99'] * 1000:.2f} ms p99")
    return rows

"""What HTTP costs: events a second of server time, and the latency from the engine's send to the client's receipt.

The engine is `loadtests.null_engine`, whose tokens carry the time at which they were sent. The client is this process,
reading raw sockets; the server is a process of its own, whose processor time is read from /proc.
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

SERVER = (sys.executable, "-m", "loadtests.null_server")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def stream(server: RunningServer, num_tokens: int, latencies: list[float] | None) -> int:
    """One streamed request. Returns the events seen; with `latencies`, one entry for each token but the first."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    request = {"prompt": "a", "max_new_tokens": num_tokens, "stream": True, "ignore_eos": True}
    body = json.dumps(request | ({"return_token_ids": True} if latencies is not None else {})).encode()
    writer.write(
        b"POST /generate HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    status = (await reader.readline()).split()[1]
    if status != b"200":
        raise RuntimeError(f"the server answered {status.decode()}")
    events = 0
    rest = b""
    while data := await reader.read(1 << 16):
        now = time.monotonic()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                events += 1
                if latencies is not None and b'"token_ids"' in line and events > 1:
                    latencies += [seconds_since(tick, now) for tick in json.loads(line[6:])["token_ids"]]
    writer.close()
    return events


async def _streams(server: RunningServer, count: int, num_tokens: int, latencies: list[float] | None) -> int:
    return sum(await asyncio.gather(*(stream(server, num_tokens, latencies) for _ in range(count))))


def throughput(rounds: int) -> tuple[float, float]:
    """Events a second of the server's own processor time, and of the wall clock, with an engine that never waits."""
    by_cpu: list[float] = []
    by_wall: list[float] = []
    with running_server(command=SERVER) as server:
        server.wait_ready()
        asyncio.run(_streams(server, 8, 100, None))
        for _ in range(rounds):
            cpu, started = cpu_seconds(server.process.pid), time.perf_counter()
            events = asyncio.run(_streams(server, 32, 2000, None))
            by_cpu.append(events / (cpu_seconds(server.process.pid) - cpu))
            by_wall.append(events / (time.perf_counter() - started))
    return statistics.median(by_cpu), statistics.median(by_wall)


def latency(num_streams: int, step_seconds: float, num_tokens: int) -> tuple[float, float, float]:
    """Median and 99th percentile, in seconds, from the engine's send to the client's receipt; and events a second."""
    os.environ["STET_NULL_STEP_SECONDS"] = str(step_seconds)
    try:
        with running_server(command=SERVER) as server:
            server.wait_ready()
            latencies: list[float] = []
            started = time.perf_counter()
            events = asyncio.run(_streams(server, num_streams, num_tokens, latencies))
            elapsed = time.perf_counter() - started
    finally:
        del os.environ["STET_NULL_STEP_SECONDS"]
    latencies.sort()
    return statistics.median(latencies), latencies[int(0.99 * len(latencies))], events / elapsed


def bench_http(rounds: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """One row for throughput, one for latency at each number of streams."""
    by_cpu, by_wall = throughput(max(rounds, 3))
    say(f"{by_cpu:.0f} events a second of server processor time")
    rows: list[dict[str, object]] = [
        {"what": "32 streams, engine never waits", "events_per_cpu_s": round(by_cpu), "events_per_s": round(by_wall)}
    ]
    for num_streams, step_seconds in ((1, 0.005), (32, 0.01), (256, 0.05)):
        median, p99, rate = latency(num_streams, step_seconds, 200)
        rows.append(
            {
                "what": f"{num_streams} streams, a step every {step_seconds * 1000:.0f} ms",
                "events_per_cpu_s": "",
                "events_per_s": round(rate),
                "added_latency_median_ms": round(median * 1000, 2),
                "added_latency_p99_ms": round(p99 * 1000, 2),
            }
        )
        say(f"{num_streams} streams: {median * 1000:.2f} ms median, {p99 * 1000:.2f} ms p99")
    rows[0] |= {"added_latency_median_ms": "", "added_latency_p99_ms": ""}
    return rows

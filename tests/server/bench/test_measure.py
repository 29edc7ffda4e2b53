"""The numbers that are reported, against a server of known timings that writes down when it sent what."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from server.bench.client import Target, exchange, resolve
from server.bench.dialect import Ask, Dialect
from server.bench.discovery import discover, tokens_per_word
from server.bench.measure import Health, Load, Record, Run, measure
from server.bench.plot import token_rate
from server.bench.summary import Limits, client_health, percentile, summarize, table
from server.bench.workload import Job

# What a busy machine adds to the median of many times.
SLACK = 0.004


@contextmanager
def scripted(**plan: Any) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.server.bench.scripted", json.dumps({"first": 0.02, "gap": 0.005} | plan)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def jobs(tokens: int) -> Iterator[Job]:
    while True:
        yield Job("one two three", tokens)


def bench(url: str, load: Load, tokens: int = 8, api: str = "completions") -> tuple[Run, dict[str, Any]]:
    """The run, and what the server wrote down."""

    async def run() -> tuple[Run, dict[str, Any]]:
        target = await resolve(url)
        found = await measure(target, Dialect(api, "scripted"), jobs(tokens), load)
        log = await exchange(target, target.request("GET", "/log"))
        return found, json.loads(log.body)

    return asyncio.run(run())


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_what_is_reported_is_what_the_server_did(api: str) -> None:
    arrivals = tuple(0.05 + 0.04 * n for n in range(12))
    with scripted(stall=0.06) as url:
        run, log = bench(url, Load(0.6, arrivals=arrivals), tokens=12, api=api)
    assert len(run.records) == len(log["streams"]) == 12
    origins = []
    for record, sent in zip(run.records, log["streams"], strict=True):
        assert len(record.times) == len(sent) == 12
        assert record.completed
        # The times are the same on both sides, but for where each begins to count.
        offsets = [there - here for here, there in zip(record.times, sent, strict=True)]
        origins.append(statistics.median(offsets))
        assert percentile([abs(offset - origins[-1]) for offset in offsets], 0.5) < SLACK
    assert max(origins) - min(origins) < 5 * SLACK
    result = summarize(run, Limits())
    gaps = [after - before for sent in log["streams"] for before, after in pairwise(sent)]
    figures = result["latency_s"]["inter_token"]
    assert figures["count"] == len(gaps) == 132
    assert figures["mean"] == pytest.approx(statistics.mean(gaps), abs=SLACK)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        assert figures[name] == pytest.approx(percentile(gaps, share), abs=2 * SLACK)
    assert figures["p99"] > 0.055  # the stall is seen
    # The server counts two tokens an event.
    spans = [(sent[-1] - sent[0]) / 23 for sent in log["streams"]]
    assert result["latency_s"]["per_output_token"]["mean"] == pytest.approx(statistics.mean(spans), abs=SLACK)
    assert result["lengths"]["output_tokens"]["mean"] == 24
    assert result["lengths"]["tokens_per_event"] == 2
    inside = sum(at - origins[0] < 0.6 for sent in log["streams"] for at in sent)
    assert result["rates"]["output_tokens_per_s"] == pytest.approx(2 * inside / 0.6, rel=0.1)
    assert sum(rate for _, rate in token_rate(run)) / 60 == pytest.approx(result["rates"]["output_tokens_per_s"])
    first = result["latency_s"]["ttft"]
    assert 0.02 <= first["p50"] < 0.02 + 3 * SLACK


def test_waiting_counts_from_when_a_request_was_due() -> None:
    """A server of 25 requests a second is offered 50: each waits 20 ms more than the one before it, and every one that
    was due is sent and counted."""
    arrivals = tuple(0.02 * n for n in range(20))
    with scripted(serial=True, first=0.039, gap=0.001) as url:
        run, log = bench(url, Load(0.4, arrivals=arrivals), tokens=1)
    began = [sent[0] for sent in log["streams"]]
    for number, record in enumerate(run.records):
        assert record.first is not None
        behind = began[number] - began[0] - 0.02 * number
        assert record.first == pytest.approx(run.records[0].first + behind, abs=5 * SLACK)
        assert record.sent - record.scheduled < 5 * SLACK  # it was not held back
    assert run.records[-1].first > 0.35


def test_a_client_that_sends_late_does_not_flatter_the_server() -> None:
    late = Record(scheduled=1.0, sent=1.5, ended=2.25)
    late.times.append(2.0)
    result = summarize(Run([late], Health(), 3.0), Limits(ttft=0.9))
    assert result["latency_s"]["ttft"]["max"] == 1.0
    assert result["latency_s"]["whole_request"]["max"] == 1.25
    assert result["rates"]["good_share"] == 0.0
    assert result["client"]["sent_late_max_s"] == 0.5


def test_a_closed_loop_keeps_so_many_open_and_no_more() -> None:
    with scripted(first=0.05, gap=0.005) as url:
        run, log = bench(url, Load(0.5, warmup=0.1, clients=3), tokens=1)
        counted, _ = bench(url, Load(60.0, clients=2, requests_each=2), tokens=1)
    assert log["most_at_once"] == 3
    assert min(record.scheduled for record in run.records) == -0.1
    result = summarize(run, Limits())
    assert result["rates"]["requests_per_s"] == pytest.approx(3 / 0.055, rel=0.25)
    for record in run.records:
        assert record.scheduled == -0.1 or any(record.scheduled == other.ended for other in run.records)
    assert len(counted.records) == 4
    assert counted.seconds == pytest.approx(0.11, abs=10 * SLACK)


def test_a_client_that_is_refused_waits_a_little() -> None:
    with scripted(refuse=1) as url:
        run, _ = bench(url, Load(0.35, clients=1), tokens=4)
    assert 2 <= len(run.records) <= 4
    assert all(record.refused for record in run.records)


def test_every_ending_is_counted_once() -> None:
    arrivals = tuple(0.01 * n for n in range(30))
    with scripted(refuse=3, cut=5, fail=7) as url:
        run, _ = bench(url, Load(0.3, arrivals=arrivals), tokens=4)
    result = summarize(run, Limits())["requests"]
    # Of 30: each third is refused; of the others 5, 10, 20, 25 are cut, and 7, 14, 28 bring an error.
    assert (result["due"], result["refused"], result["failed"], result["completed"]) == (30, 10, 7, 13)
    assert result["errors"] == {"429: no room": 10, "ended early: no [DONE]": 4, "it broke": 3}
    assert result["finish_reasons"] == {"length": 13}


def test_a_request_that_never_ends_is_given_up() -> None:
    with scripted(first=5.0) as url:
        run, _ = bench(url, Load(0.1, arrivals=(0.05,), timeout=0.2))
    assert [record.error for record in run.records] == ["no end within 0.2 s"]
    assert summarize(run, Limits())["requests"]["failed"] == 1


def test_goodput_counts_what_kept_every_limit() -> None:
    def record(first: float, *gaps: float, error: str | None = None) -> Record:
        found = Record(0.1, error=error)
        found.times.append(0.1 + first)
        for gap in gaps:
            found.times.append(found.times[-1] + gap)
        found.ended = found.times[-1]
        return found

    records = [record(0.2, 0.01, 0.01), record(0.1, 0.01, 0.09), record(0.1, 0.03, 0.03), record(0.1, error="x")]
    run = Run(records, Health(), 2.0)
    for limits, good in (
        (Limits(), 3),
        (Limits(ttft=0.15), 2),
        (Limits(itl=0.05), 2),
        (Limits(tpot=0.04), 2),
        (Limits(0.15, 0.05, 0.04), 1),
    ):
        rates = summarize(run, limits)["rates"]
        assert (rates["goodput_requests_per_s"], rates["good_share"]) == (good / 2, good / 4)


def test_the_client_says_when_it_was_the_limit() -> None:
    async def held_up() -> Health:
        async def hog() -> None:
            for _ in range(8):
                end = time.perf_counter() + 0.04
                while time.perf_counter() < end:
                    pass
                await asyncio.sleep(0)

        holding = asyncio.create_task(hog())
        target = Target("127.0.0.1", 1, "127.0.0.1")
        found = await measure(target, Dialect("completions"), jobs(1), Load(0.3, arrivals=(0.3,)))
        await holding
        return found.health

    health = asyncio.run(held_up())
    assert client_health(health, [])["loop_lag_max_s"] > 0.025
    assert health.cpu > 0.1  # at least half of what the loop burnt
    health.cpu = 0.9 * health.wall
    assert "the client itself was the limit" in client_health(health, [])["warnings"][0]
    idle = Health(cpu=0.1, wall=10.0)
    idle.lags.extend([0.001] * 100)
    assert client_health(idle, [0.001])["warnings"] == []
    assert "others on this machine" in client_health(idle, [0.05])["warnings"][0]


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([*range(100)], 0.99) == 98


def test_nothing_completed_is_reported_and_not_an_error() -> None:
    assert "0 due in 1 s" in table(summarize(Run([], Health(), 1.0), Limits()))


def test_another_server_is_found_out() -> None:
    async def look(url: str) -> tuple[Dialect, dict[str, Any], int | None, float]:
        target = await resolve(url)
        dialect, server, context = await discover(target, "auto", None)
        rate = await tokens_per_word(target, dialect, Ask("one two three", 2))
        return dialect, server, context, rate

    with scripted() as url:
        assert asyncio.run(look(f"{url}/v1/")) == (
            Dialect("completions", "scripted"),
            {"model": "scripted"},
            4096,
            2.0,
        )

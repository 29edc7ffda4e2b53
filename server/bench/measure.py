"""Sends the requests, in an open or a closed loop, and writes down when what came back.

Every time is taken from the *scheduled* arrival: a client that falls behind, or a server that makes it wait for a
connection, lengthens the measured times instead of thinning out the requests (no coordinated omission). In a closed
loop a request is due when its client's last one has ended, or a tenth of a second after one that failed.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from server.bench.client import Target, exchange
from server.bench.dialect import Ask, Dialect, Usage, error_of, read_event
from server.bench.wire import WireError
from server.bench.workload import Job

_TICK_SECONDS = 0.01
RETRY_SECONDS = 0.1


@dataclass(slots=True)
class Record:
    """One request. Times in seconds from the beginning of the measured time; those during the warm-up are negative.

    times: of each event that brought text. status: of HTTP; 0 without an answer. error: why it did not complete.
    """

    scheduled: float
    max_tokens: int = 0
    sent: float = 0.0
    ended: float = 0.0
    status: int = 0
    times: array[float] = field(default_factory=lambda: array("d"))
    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def completed(self) -> bool:
        """Whether it was answered to its end."""
        return self.error is None

    @property
    def refused(self) -> bool:
        """Whether the server said that it has no room now: 429 or 503."""
        return self.status in (429, 503)

    @property
    def first(self) -> float | None:
        """Time to the first token, from the scheduled arrival."""
        return self.times[0] - self.scheduled if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Times between events that brought text."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def per_token(self) -> float | None:
        """Time per output token after the first, by the server's own count of tokens; None below two."""
        tokens = self.usage.completion_tokens or len(self.times)
        if tokens < 2 or not self.times:
            return None
        return (self.times[-1] - self.times[0]) / (tokens - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """Either an open loop of `arrivals` (times from the warm-up's beginning), or a closed one of `clients`, each with
    at most `requests_each` requests. seconds: of the measured time; warmup: before it, sent and not counted."""

    seconds: float
    warmup: float = 0.0
    arrivals: tuple[float, ...] | None = None
    clients: int = 0
    requests_each: int | None = None
    timeout: float = 600.0


@dataclass(slots=True)
class Health:
    """What the client itself needed and how late it was. cpu, wall, waited: seconds; waited is for a processor that
    others had (None where the system does not tell). lags: of a timer that is due every 10 ms, in seconds."""

    cpu: float = 0.0
    wall: float = 0.0
    waited: float | None = None
    lags: array[float] = field(default_factory=lambda: array("d"))


@dataclass(slots=True)
class Run:
    """All requests, in the order in which they were due, and the client's health. seconds: of the measured time."""

    records: list[Record]
    health: Health
    seconds: float


async def measure(
    target: Target,
    dialect: Dialect,
    jobs: Iterator[Job],
    load: Load,
    *,
    make: Callable[[Job], Ask] = lambda job: Ask(job.prompt, job.max_tokens),
    say: Callable[[float], None] = lambda share: None,
) -> Run:
    """Carry the load out and wait until all requests have ended.

    say: is told the share of the time that is over, twice a second.
    """
    origin = time.perf_counter() + load.warmup
    records: list[Record] = []
    health, watching = Health(), asyncio.Event()
    watcher = asyncio.create_task(_watch(health, watching))

    async def one(scheduled: float) -> Record:
        job = next(jobs)
        record = Record(scheduled, job.max_tokens)
        records.append(record)
        await send(target, dialect, make(job), record, origin, load.timeout)
        return record

    async def client() -> None:
        sent = 0
        due = -load.warmup
        while due < load.seconds and sent != load.requests_each:
            record = await one(due)
            sent += 1
            due = record.ended
            if not record.completed:  # a server that refuses is not to be asked as fast as it can refuse
                due += RETRY_SECONDS
                await asyncio.sleep(RETRY_SECONDS)

    async def tell() -> None:
        while True:
            await asyncio.sleep(0.5)
            share = (time.perf_counter() - origin + load.warmup) / (load.seconds + load.warmup)
            say(min(1.0, share))

    telling = asyncio.create_task(tell())
    tasks: list[asyncio.Task[object]] = []
    try:
        if load.arrivals is None:
            tasks += [asyncio.create_task(client()) for _ in range(load.clients)]
        else:
            for arrival in load.arrivals:
                due = arrival - load.warmup
                wait = origin + due - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
    finally:
        telling.cancel()
        for task in tasks:
            task.cancel()
        watching.set()
        await watcher
    records.sort(key=lambda record: record.scheduled)
    seconds = load.seconds
    if load.requests_each is not None:
        seconds = max(record.ended for record in records)
    return Run(records, health, seconds)


async def send(
    target: Target, dialect: Dialect, ask: Ask, record: Record, origin: float, limit: float | None = None
) -> None:
    """One streamed request, written into its record. Raises nothing: what goes wrong stands in the record."""
    done = False

    def on_event(data: bytes, now: float) -> bool:
        nonlocal done
        event = read_event(data)
        if event.has_text:
            record.times.append(now - origin)
        if event.usage is not None:
            record.usage = event.usage
        if event.finish_reason is not None:
            record.finish_reason = event.finish_reason
        if event.error is not None:
            record.error = event.error
        done |= event.done
        return False

    request = target.request("POST", dialect.path, dialect.body(ask))
    record.sent = time.perf_counter() - origin
    try:
        async with asyncio.timeout(limit):
            reply = await exchange(target, request, on_event)
    except TimeoutError:
        record.error = f"no end within {limit:g} s"
    except (OSError, WireError, ValueError) as error:
        record.error = str(error) or type(error).__name__
    else:
        record.status = reply.status
        if reply.status != 200:
            record.error = f"{reply.status}: {_message(reply.body)}"
        elif record.error is None and (not done or record.finish_reason in ("error", "deadline", "cancelled")):
            record.error = f"ended early: {record.finish_reason or 'no [DONE]'}"
    record.ended = time.perf_counter() - origin


def _message(body: bytes) -> str:
    try:
        return error_of(json.loads(body))
    except (ValueError, AttributeError):
        return " ".join(body[:200].decode(errors="replace").split())


async def _watch(health: Health, stop: asyncio.Event) -> None:
    """Fill in the client's health until told to stop."""
    cpu, wall, waited = time.process_time(), time.perf_counter(), _waited()
    while not stop.is_set():
        due = time.perf_counter() + _TICK_SECONDS
        await asyncio.sleep(_TICK_SECONDS)
        health.lags.append(max(0.0, time.perf_counter() - due))
    health.cpu = time.process_time() - cpu
    health.wall = time.perf_counter() - wall
    now = _waited()
    health.waited = None if waited is None or now is None else now - waited


def _waited() -> float | None:
    """Seconds that this thread was ready to run and had no processor, as Linux counts them."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None

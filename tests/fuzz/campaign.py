"""A run of all three kinds of requests, what came of it, and what must hold at its end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtests.processes import RunningServer
from tests.end_to_end.client import metrics, post
from tests.fuzz.bodies import send_bodies
from tests.fuzz.raw import LET_GO_SECONDS, make_raw, send_raw, send_slow

# A short context, so that no answer is long by right; few places, so that the queue is seen full as well.
FLAGS = ("--docs", "--max-model-len", "64", "--max-running", "8", "--max-waiting", "24")
MAX_SECONDS = 5.0
PLAIN = {"prompt": "Once upon a time", "temperature": 0, "max_new_tokens": 32, "return_token_ids": True}


@dataclass
class Report:
    """What was sent and answered. failures: what must not have been, each in one line."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, kind: str) -> None:
        with self._lock:
            self.kinds[kind] += 1

    def answered(self, status: int, seconds: float, what: str) -> None:
        """One answer. 501 and 503 are declared; no other 5xx is."""
        with self._lock:
            self.statuses[status] += 1
            self.slowest = max(self.slowest, seconds)
        if status >= 500 and status not in (501, 503):
            self.fail(f"status {status}: {what}")
        if seconds > MAX_SECONDS:
            self.fail(f"{seconds:.1f} s: {what}")

    def fail(self, text: str) -> None:
        with self._lock:
            if len(self.failures) < 100:
                self.failures.append(text[:600])

    def check_log(self, log: str) -> None:
        """Whether the server itself saw a defect, or said what it must not."""
        for mark in ("internal error", "Traceback", "a stream failed", '"level":"error"'):
            if mark in log:
                line = next(line for line in log.splitlines() if mark in line)
                self.fail(f"in the log: {line}")

    def text(self) -> str:
        """For a person."""
        lines = [f"sent: {dict(self.kinds)}", f"answered: {dict(sorted(self.statuses.items()))}"]
        lines.append(f"slowest answer: {self.slowest:.2f} s")
        return "\n".join([*lines, *(f"FAILED {text}" for text in self.failures)])


def run_campaign(
    server: RunningServer,
    num_requests: int,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
    slow_patience: float = LET_GO_SECONDS,
) -> Report:
    """Send so many requests, a part of each kind at once, then look whether the server is as it was.

    slow_patience: seconds after which a slow client gives up by itself.
    """
    report = Report()
    before = asyncio.run(post(server, PLAIN)).body["outputs"]
    num_slow = max(4, num_requests // 50)
    raw = make_raw(num_requests // 3, seed)
    threads = [
        threading.Thread(target=lambda: asyncio.run(send_slow(server, report, num_slow, seed, slow_patience))),
        threading.Thread(target=lambda: asyncio.run(send_raw(server, report, raw))),
    ]
    for thread in threads:
        thread.start()
    send_bodies(server, report, num_requests - num_slow - len(raw), seed, say)
    for thread in threads:
        thread.join()
    _check_rest(server, report)
    if asyncio.run(post(server, PLAIN)).body["outputs"] != before:
        report.fail("the embedded model answers otherwise than before")
    return report


def _check_rest(server: RunningServer, report: Report) -> None:
    """Nothing is left of the requests: no place, no block, and the books balance."""

    async def settle() -> dict[str, float]:
        for _ in range(250):
            now = await asyncio.to_thread(metrics, server)
            if not (now["stet_requests_running"] or now["stet_requests_waiting"]):
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)  # the next heartbeat has the blocks
        return await asyncio.to_thread(metrics, server)

    now = asyncio.run(settle())
    for name in ("stet_requests_running", "stet_requests_waiting", 'stet_kv_cache_blocks{state="used"}'):
        if now[name]:
            report.fail(f"{name} is {now[name]} at the end")
    for name in now:
        if (
            name.startswith("stet_http_requests_total")
            and 'status="5' in name
            and not ('status="503"' in name or 'status="501"' in name)
        ):
            report.fail(f"{name} is {now[name]}")
    if now["stet_engine_restarts_total"]:
        report.fail("the engine was started again")
    status, body = server.get("/readyz")
    if (status, json.loads(body)) != (200, {"status": "ready"}):
        report.fail(f"/readyz says {body!r}")

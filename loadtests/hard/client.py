"""One request on a connection of its own, and what is asked of a server between requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from loadtests.processes import RunningServer
from server.bench import wire
from server.bench.client import Target, exchange, send_and_leave


@dataclass(slots=True)
class Answer:
    """status 0: the client left, or there was no connection. seconds: from the connection's start to the end of all."""

    status: int = 0
    seconds: float = 0.0
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    num_events: int = 0


async def ask(
    server: RunningServer,
    body: Mapping[str, Any] | None,
    *,
    path: str = "/generate",
    key: str | None = None,
    leave_after: int | None = None,
) -> Answer:
    """Send one request (GET without a body) and read its answer; with leave_after, only so many events of a stream."""
    answer = Answer()
    target = Target(server.host, server.port, server.host)

    def on_event(data: bytes, now: float) -> bool:
        answer.num_events += 1
        return answer.num_events == leave_after

    began = time.perf_counter()
    try:
        if leave_after == 0:
            await send_and_leave(target, request_bytes(body, path, key))
            return answer
        reply = await exchange(target, request_bytes(body, path, key), on_event)
    finally:
        answer.seconds = time.perf_counter() - began
    answer.status, answer.headers, answer.body = reply.status, reply.headers, reply.body
    return answer


def request_bytes(
    body: Mapping[str, Any] | None, path: str = "/generate", key: str | None = None, *, keep: bool = False
) -> bytes:
    """A request; it asks for the connection's end, unless that is to be kept."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return wire.request_bytes("GET" if body is None else "POST", path, "test", data, headers, keep=keep)


class _KeptConnection(asyncio.Protocol):
    """One plain answer after the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._reply: asyncio.Future[Answer] | None = None
        self._reader = wire.ResponseReader()
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._body.append(self._reader.feed(data))
        if self._reader.done and self._reply is not None:
            self._reply.set_result(Answer(self._reader.status, 0.0, b"".join(self._body), self._reader.headers))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(exc or ConnectionResetError("the server closed the connection"))

    async def send(self, request: bytes) -> Answer:
        assert self.transport is not None
        self._reply = asyncio.get_running_loop().create_future()
        self._reader, self._body = wire.ResponseReader(), []
        self.transport.write(request)
        return await self._reply


class KeptConnections:
    """As many connections as requests are under way, each used again, as a proxy or a client's pool does."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._idle: list[_KeptConnection] = []

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """Send one POST /generate and read its answer, which is no stream. Raises OSError, WireError."""
        began = time.perf_counter()
        connection = self._idle.pop() if self._idle else None
        if connection is None or connection.transport is None:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_KeptConnection, self._server.host, self._server.port)
        answer = await connection.send(request_bytes(body, keep=True))
        answer.seconds = time.perf_counter() - began
        self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.close()


async def metrics(server: RunningServer) -> dict[str, float]:
    """Every sample of /metrics by its name and labels."""
    text = (await ask(server, None, path="/metrics")).body
    samples = (line.rsplit(" ", 1) for line in text.decode().splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


async def settled(server: RunningServer, seconds: float = 10.0) -> dict[str, float]:
    """The metrics once nothing is being done any more. Raises TimeoutError."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        now = await metrics(server)
        names = ("stet_requests_running", "stet_requests_waiting", 'stet_kv_cache_blocks{state="used"}')
        if not any(now[name] for name in names):
            return now
        await asyncio.sleep(0.05)
    raise TimeoutError(f"requests or blocks are left after {seconds} s")


def resident_bytes(pid: int) -> int:
    """Memory of a process that lies in RAM now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


async def probe(server: RunningServer, until: asyncio.Event, path: str = "/livez") -> list[float]:
    """How long a probe took, every 20 ms, until told to stop. Raises RuntimeError for another status than 200."""
    taken: list[float] = []
    while not until.is_set():
        answer = await ask(server, None, path=path)
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}")
        taken.append(answer.seconds)
        await asyncio.sleep(0.02)
    return taken


async def repeated(count: int, at_once: int, call: Callable[[int], Awaitable[Answer]]) -> list[Answer]:
    """So many calls, so many of them at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> Answer:
        async with places:
            return await call(number)

    return await asyncio.gather(*map(one, range(count)))

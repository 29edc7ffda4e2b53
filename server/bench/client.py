"""One request on a connection of its own, as cheaply as asyncio allows: a protocol without tasks or streams.

Chosen by what an event costs the client, which shares the machine with the server more often than not; the measured
alternatives are in loadtests/README.md. A connection for each request, because some servers close idle ones just as
the next request is sent.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from server.bench.wire import EventReader, ResponseReader, WireError, request_bytes


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens. prefix: what stands before every path. address: the host, resolved once. key: sent as
    `Authorization: Bearer`."""

    host: str
    port: int
    address: str
    prefix: str = ""
    tls: ssl.SSLContext | None = None
    key: str | None = None

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """The bytes of one request."""
        named = f"[{self.host}]" if ":" in self.host else self.host
        auth = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return request_bytes(method, self.prefix + path, f"{named}:{self.port}", body, {**auth, **(headers or {})})


def parse_url(url: str) -> tuple[str, int, str, bool]:
    """Host, port, path before all paths, and whether TLS is meant. Raises ValueError with what is allowed.

    A trailing `/v1` is dropped: OpenAI's clients are given such addresses, and the paths here begin with it.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError("an address such as http://127.0.0.1:8000")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("an address whose port is from 1 to 65535") from None
    tls = parts.scheme == "https"
    return parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/").removesuffix("/v1"), tls


async def resolve(url: str, key: str | None = None) -> Target:
    """Look the host up once. Raises ValueError for an address that is none, OSError for a host that is not found."""
    host, port, prefix, tls = parse_url(url)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    return Target(host, port, str(found[0][4][0]), prefix, ssl.create_default_context() if tls else None, key)


@dataclass(slots=True)
class Reply:
    """What came back. body: of an answer that is no event stream. ended: time.perf_counter() at its end."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: float = 0.0


# Is given the data of an event and when it came (time.perf_counter()); True ends the connection.
OnEvent = Callable[[bytes, float], bool]


class _Exchange(asyncio.Protocol):
    def __init__(self, request: bytes, on_event: OnEvent | None) -> None:
        self.finished: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._request = request
        self._on_event = on_event
        self._reader = ResponseReader()
        self._events: EventReader | None = None
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.finished.done():
            return
        reader = self._reader
        try:
            before = reader.status
            body = reader.feed(data)
            if before == 0 and reader.status and reader.headers.get("content-type", "").startswith("text/event-stream"):
                self._events = EventReader()
            if self._events is None or self._on_event is None:
                self._body.append(body)
            else:
                for event in self._events.feed(body):
                    if self._on_event(event, now):
                        self._end(now)
                        return
        except (WireError, ValueError) as error:
            self.finished.set_exception(error)
            return
        if reader.done:
            self._end(now)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.finished.done():
            return
        now = time.perf_counter()
        try:
            self._reader.end()
        except WireError as error:
            self.finished.set_exception(exc or error)
        else:
            self._end(now)

    def _end(self, now: float) -> None:
        self.finished.set_result(Reply(self._reader.status, self._reader.headers, b"".join(self._body), now))


async def exchange(target: Target, request: bytes, on_event: OnEvent | None = None) -> Reply:
    """Send one request, and read its answer to the end or until on_event says that it is enough.

    on_event: is called for each event of an event stream. Raises OSError, WireError, or what on_event raises of
    ValueError. Cancelled, it closes the connection, which a server takes for a client that has left.
    """
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(
        lambda: _Exchange(request, on_event),
        target.address,
        target.port,
        ssl=target.tls,
        server_hostname=target.host if target.tls else None,
    )
    try:
        reply = await protocol.finished
    except BaseException:
        transport.abort()
        raise
    transport.close()
    return reply


async def send_and_leave(target: Target, request: bytes) -> None:
    """Send one request and close the connection without a look at the answer. Raises OSError."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, target.address, target.port, ssl=target.tls)
    transport.write(request)
    transport.close()

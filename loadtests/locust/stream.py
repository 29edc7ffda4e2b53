"""One streamed request over a blocking socket, which gevent makes cooperative under locust."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.bench.wire import EventReader, ResponseReader, WireError

# Of a slow reader: what its kernel keeps for it, how much it takes at a time.
SLOW_BUFFER, SLOW_BYTES = 4096, 256
_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens; tls: as https."""

    host: str
    port: int
    tls: bool = False


@dataclass(slots=True)
class Reply:
    """status 0: the reader left before there was one. body: of an answer that is no event stream."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def exchange(
    address: Address,
    request: bytes,
    on_event: Callable[[bytes, float], bool] | None = None,
    *,
    seconds: float = 120.0,
    pause: float = 0.0,
) -> Reply:
    """Send a request and read its answer to the end, or until on_event, given an event's data and when it came
    (time.perf_counter()), says that it is enough.

    pause: a slow reader's, in seconds before each few bytes. Raises OSError (TimeoutError after `seconds` without a
    byte) and WireError.
    """
    reader, events, body = ResponseReader(), EventReader(), []
    with _connect(address, seconds, slow=pause > 0) as sock:
        sock.sendall(request)
        while not reader.done:
            if pause:
                time.sleep(pause)
            data = sock.recv(SLOW_BYTES if pause else _BYTES)
            now = time.perf_counter()
            if not data:
                reader.end()
                break
            part = reader.feed(data)
            if on_event is None or not reader.headers.get("content-type", "").startswith("text/event-stream"):
                body.append(part)
            elif any(on_event(event, now) for event in events.feed(part)):
                break
    return Reply(reader.status, reader.headers, b"".join(body))


def _connect(address: Address, seconds: float, slow: bool) -> socket.socket:
    sock = socket.create_connection((address.host, address.port), timeout=seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if slow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
    if not address.tls:
        return sock
    return ssl.create_default_context().wrap_socket(sock, server_hostname=address.host)


__all__ = ["Address", "Reply", "WireError", "exchange"]

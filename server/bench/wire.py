"""HTTP/1.1 and server-sent events as bytes, without sockets: what every client of the measurements reads answers with.

Only what a response of a server on the other side of one connection can be: a body with a length, in chunks, or until
the connection ends. No library: the load tests also run where only locust is installed, and this costs about two
microseconds an event. Sources: RFC 9112; the HTML standard's section on server-sent events.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_LINE = 1 << 16


class WireError(Exception):
    """What came is not the HTTP/1.1 response that was expected, or it was cut off. One line."""


def request_bytes(
    method: str,
    path: str,
    host: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    keep: bool = False,
) -> bytes:
    """One request. host: as the Host header names it. keep: another one may follow on the connection."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *([] if keep else ["Connection: close"])]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class ResponseReader:
    """Takes one response apart as it comes. status is 0 until its head is complete; done once its body is.

    feed() returns what of the body has come; end() is told that the connection has ended. Both raise WireError.
    """

    __slots__ = ("_buffer", "_chunked", "_left", "done", "headers", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = b""
        self._chunked = False
        # Bytes still to come of the body or of the chunk; None: until the connection ends, or a chunk's size is next.
        self._left: int | None = None

    def feed(self, data: bytes) -> bytes:
        """What of the body is in the next bytes of the connection, its chunks joined."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if self.status == 0:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._keep(data)
                return b""
            status = self._head(data[:end])
            data = data[end + 4 :]
            if 100 <= status < 200:
                return self.feed(data)
            self.status = status
        if self._chunked:
            return self._chunks(data)
        if self._left is None:
            return data
        taken = data[: self._left]
        self._left -= len(taken)
        self.done = self._left == 0
        return taken

    def end(self) -> None:
        """The connection has ended: the response is complete, or this raises WireError."""
        if self.status and not self._chunked and self._left is None:
            self.done = True
        if not self.done:
            raise WireError("the connection ended in the middle of the answer" if self.status else "no answer came")

    def _keep(self, data: bytes) -> None:
        if len(data) > MAX_LINE:
            raise WireError("a header or a chunk's size without an end")
        self._buffer = data

    def _head(self, head: bytes) -> int:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isdigit() and len(code) == 3):
            raise WireError(f"the answer is no HTTP/1.1: {first[:60]!r}")
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        status = int(code)
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if status in (204, 304):
            length = "0"
        if length is not None and not self._chunked:
            if not length.isdigit():
                raise WireError(f"Content-Length {length[:20]!r}")
            self._left = int(length)
            self.done = self._left == 0 and status >= 200
        return status

    def _chunks(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        at = 0
        while not self.done:
            if self._left is None:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._keep(data[at:])
                    break
                self._left = self._chunk_size(data[at:end])
                at = end + 2
                if self._left == 0:
                    # Trailers may follow; the connection ends after them.
                    self.done = True
                    break
            piece = data[at : at + self._left]
            if piece:
                parts.append(piece)
                at += len(piece)
                self._left -= len(piece)
            if self._left:
                break
            if len(data) < at + 2:
                # The chunk's own line end is still to come: ask for it again as an empty rest.
                self._buffer = data[at:]
                self._left = 0
                break
            at += 2
            self._left = None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk_size(self, line: bytes) -> int:
        try:
            return int(line.split(b";", 1)[0], 16)
        except ValueError:
            raise WireError(f"a chunk's size is {line[:20]!r}") from None


class EventReader:
    """Server-sent events from the bytes of a body: the data of each, its lines joined. Comments and fields other than
    data are left out; an event that the body's end cuts off is none."""

    __slots__ = ("_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The data of every event that these bytes complete."""
        events: list[bytes] = []
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        return events

"""A raw HTTP client for tests that need every byte."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class RawAnswer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Connection:
    """One socket; `send` bytes, `answer` reads one response."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(10)
        self.sock.connect(("127.0.0.1", port))
        self._buffer = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read_until(self, mark: bytes) -> bytes:
        """Bytes through the mark. Raises EOFError at the end of the connection."""
        while mark not in self._buffer:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(self._buffer)
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(mark)
        return found + mark

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(self._buffer)
            self._buffer += data
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def answer(self, *, head: bool = False) -> RawAnswer:
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
        if head or status == 100:
            return RawAnswer(status, headers, b"")
        if "content-length" in headers:
            return RawAnswer(status, headers, self._read(int(headers["content-length"])))
        body = b""
        while size := int(self.read_until(b"\r\n"), 16):
            body += self._read(size)
            self._read(2)
        self._read(2)
        return RawAnswer(status, headers, body)

    def rest(self) -> bytes:
        """Everything up to the connection's end."""
        data, self._buffer = self._buffer, b""
        while piece := self.sock.recv(65536):
            data += piece
        return data

    def at_end(self) -> bool:
        """Whether the server has closed the connection (waits for it)."""
        if self._buffer:
            return False
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


def post(body: bytes | dict[str, Any], path: str = "/generate", *headers: str, length: int | None = None) -> bytes:
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(data) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def get(path: str, method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *headers, "", ""]).encode("latin-1")


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until the condition holds. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError("the condition does not come true")
        time.sleep(0.005)
    return time.monotonic() - began

"""Bytes: requests with a piece changed, lost or doubled, and what is no request at all; and bodies that come slowly."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from loadtests.processes import RunningServer
from tests.fuzz.examples import examples
from tests.server.http.wire import get, post

if TYPE_CHECKING:
    from tests.fuzz.campaign import Report

_NUM_AT_ONCE = 24
# Time for an answer before the connection's own end is sent, which ends whatever is still being done for it.
_PATIENCE_SECONDS = 0.1
# 10 s for the head, 10 s for the body, and some for a busy machine.
LET_GO_SECONDS = 24.0
SEEDS = (
    post({"prompt": "Once", "max_new_tokens": 3}),
    post({"prompt": "Once", "max_new_tokens": 8, "stream": True, "n": 2}),
    post({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}, "/v1/chat/completions"),
    post(b'5\r\n{"pro\r\n9\r\nmpt":"x"}\r\n0\r\n\r\n', "/generate", "Transfer-Encoding: chunked"),
    post({"tokens": [1, 2, 3]}, "/detokenize"),
    get("/metrics"),
    get("/v1/models/%2e%2e%2fetc"),
    post({"prompt": "x"}, "/generate", "Expect: 100-continue"),
    get("/info", "GET", "Connection: Upgrade", "Upgrade: websocket"),
)
PIECES = (
    b"\r\n", b"\n", b"\x00", b"\xff\xfe", b": ", b"Content-Length: 0\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", b"HTTP/0.9", b"{", b'"', b"[" * 40, b"9" * 500, b"1e999", b"NaN",
    b"\\ud800", b"%00", b"//", b"..", b"Host: a\r\nHost: b\r\n", b"X: " + b"y" * 20_000 + b"\r\n", b"\r\n\r\n",
    b"\x1b[31m",
)  # fmt: skip


@st.composite
def raw_requests(draw: st.DrawFn) -> bytes:
    """One to three requests in a row, with up to six changes."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 6))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        change = draw(st.sampled_from(("flip", "insert", "cut", "drop", "double")))
        if change == "flip":
            data[at] ^= draw(st.integers(1, 255))
        elif change == "insert":
            data[at:at] = draw(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=20))
        elif change == "cut":
            del data[at:]
        else:
            end = min(len(data), at + draw(st.integers(1, 30)))
            data[at:end] = b"" if change == "drop" else bytes(data[at:end]) * 2
    return bytes(data)


def make_raw(count: int, number: int) -> list[bytes]:
    """So many of them. Not in a thread: Python 3.11 cannot compile in two at once, and hypothesis compiles."""
    requests: list[bytes] = []

    @examples(count, number)
    @given(raw_requests() | st.binary(max_size=300))
    def make(data: bytes) -> None:
        requests.append(data)

    make()
    return requests


async def send_raw(server: RunningServer, report: Report, requests: list[bytes]) -> None:
    """Send them, some at once."""
    places = asyncio.Semaphore(_NUM_AT_ONCE)

    async def send(data: bytes) -> None:
        async with places:
            report.sent("bytes")
            await _exchange(server, report, [data], [], f"{data!r:.400}", _PATIENCE_SECONDS)

    await asyncio.gather(*map(send, requests))


async def send_slow(server: RunningServer, report: Report, count: int, number: int, patience: float) -> None:
    """Bodies and heads that drip, stand still or never end, all at once: each must have been let go of in time, which
    is seen if one has the patience."""
    rng = random.Random(number)

    async def send(position: int) -> None:
        report.sent("slow")
        data = rng.choice(SEEDS)
        stop = rng.randrange(1, len(data))
        pieces = [data[:stop]] if position % 2 else [data[at : min(at + 9, stop)] for at in range(0, stop, 9)]
        pauses = [rng.uniform(0, 0.3) for _ in pieces]
        await asyncio.sleep(rng.uniform(0, 3))
        # A place in the middle of a request: the server waits for the rest, 10 s for the head and 10 s for the body.
        await _exchange(server, report, pieces, pauses, f"slowly {data[:stop]!r:.300}", patience, slow=True)

    await asyncio.gather(*map(send, range(count)))


async def _exchange(
    server: RunningServer,
    report: Report,
    pieces: list[bytes],
    pauses: list[float],
    what: str,
    patience: float,
    slow: bool = False,
) -> None:
    """Send, wait for the end of the connection at most so long, end it, and judge every answer that came."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    received = b""
    try:
        for piece, pause in zip(pieces, pauses or [0.0], strict=True):
            writer.write(piece)
            await asyncio.sleep(pause)
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                while data := await reader.read(65536):
                    received += data
        except TimeoutError:
            if slow and patience >= LET_GO_SECONDS:
                report.fail(f"still open after {patience} s, received {received!r:.200}: {what}")
            if writer.can_write_eof():
                writer.write_eof()
            async with asyncio.timeout(10):
                while data := await reader.read(65536):
                    received += data
        waited = time.monotonic() - began
    except OSError:
        waited = 0.0  # the server has closed it while it was written to: that is its right
    except TimeoutError:
        report.fail(f"the connection does not end: {what}")
        return
    finally:
        writer.close()
    for start in _starts(received):
        status = received[start + 9 : start + 12]
        if not status.isdigit():
            report.fail(f"no status in {received[start : start + 60]!r}: {what}")
            continue
        # A slow request is answered when its time is up, and that is not the server's slowness.
        report.answered(int(status), 0.0 if slow else waited, what)
    if b"Traceback" in received or b"site-packages" in received or b"0x7f" in received:
        report.fail(f"an answer tells of the inside: {what}")


def _starts(received: bytes) -> list[int]:
    """Where answers begin: at the start, and behind the end of another one."""
    found, at = [], received.find(b"HTTP/1.1 ")
    while at >= 0:
        found.append(at)
        at = received.find(b"HTTP/1.1 ", at + 1)
    return found

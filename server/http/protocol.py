"""uvicorn's fast HTTP/1.1 protocol, with the bounds that it lacks.

Its parser, in C, accepts a header of 32 MiB and lets a silent socket stay for ever; the other parser on offer, h11,
bounds the head but answers fewer requests a second (docs/api.md has the numbers). So: the fast one, and here the head
is bounded by bytes and by time, a reader that stalls is cut off, and a connection that is lost ends every request on
it, pipelined ones too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.generation import Problem
from server.http.errors import STATUS, error_body
from server.http.limits import Limits

# After an answer to a head that was not read to its end: time for the client to read it before the connection goes.
_LINGER_SECONDS = 1.0
_MAX_PIPELINED = 16


class _HeadRefused(Exception):
    """Ends the parser's work from inside one of its callbacks."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    on_reject is told the status of an answer that was given without asking the application.

    What arrives is a head (until its empty line), a body, or nothing. One timer bounds the time in which a head, or a
    body that nobody reads any more, must arrive; the application itself bounds the time of a body that it reads.
    """

    def __init__(self, *args: Any, limits: Limits, on_reject: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._on_reject = on_reject
        self._part: str | None = "head"
        self._fed_head_bytes = 0
        self._parsed_head_bytes = 0
        self._running: RequestResponseCycle | None = None
        self._rejected = False
        self._fault = "The request is not valid HTTP/1.1."
        self._upgrading = False
        self._receipt_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm_receipt()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_receipt()
        self._cancel_stall()
        # The base class knows only the request that arrived last; one before it may be the one that is being answered.
        cycles = [self._running, *(cycle for cycle, _ in self.pipeline)]
        self.pipeline.clear()
        super().connection_lost(exc)
        for cycle in cycles:
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._rejected:
            return
        if self._part == "head":
            self._fed_head_bytes += len(data)
        self._feed(data)
        if self._rejected or self.transport.is_closing():
            return
        if self._part == "head" and self._fed_head_bytes > self._limits.max_head_bytes:
            self._reject_head()
        elif self._answering():
            self._cancel_receipt()
        else:
            self._arm_receipt()

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._upgrading:
                self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Read a request that offers another protocol as what it is without the offer.

        Some clients offer HTTP/2 with every first request. The parser takes the body of such a request for the other
        protocol's bytes and would drop it; so a fresh parser gets the same head without the offer, and then the body.
        """
        self._upgrading = False
        offered = (b"upgrade", b"connection", b"http2-settings")
        head = [b"%b %b HTTP/1.1\r\n" % (self.parser.get_method(), self.url)]
        head += [b"%b: %b\r\n" % header for header in self.headers if header[0] not in offered]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join([*head, b"\r\n"]) + rest)

    def send_400_response(self, msg: str) -> None:
        """The parser gave up, on its own or from a callback of ours."""
        if self._parsed_head_bytes > self._limits.max_head_bytes:
            self._reject_head()
        else:
            self._reject("invalid_request", self._fault)

    # The parser's callbacks

    def on_message_begin(self) -> None:
        self._part = "head"
        # At least this byte of it is there; how many more came with it is counted as they are parsed.
        self._fed_head_bytes, self._parsed_head_bytes = 1, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Four bytes for the colon, the space and the end of the line.
        self._count_head(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise _HeadRefused
        if self.parser.get_http_version() == "1.1" and [name for name, _ in self.headers].count(b"host") != 1:
            self._fault = "A request of HTTP/1.1 has exactly one Host header."  # RFC 9112, section 3.2
            raise _HeadRefused
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrading = True
            return
        self._part = "body"
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._part = None
        super().on_message_complete()

    def _count_head(self, size: int) -> None:
        self._parsed_head_bytes += size
        if self._parsed_head_bytes > self._limits.max_head_bytes:
            raise _HeadRefused

    # Answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, _until_the_end(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # Closing waits for the rest of the answer to be read: not for ever.
            self._arm_stall()
        elif not self._answering() and self._part is not None:
            # The rest of a body that was refused, or a part of the next head, is still on its way.
            self._arm_receipt()

    def _answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _reading_body(self) -> bool:
        """Whether the request that is carried out has not been read to its end, nor been answered."""
        cycle = self._running
        return cycle is not None and cycle is self.cycle and cycle.more_body and not cycle.response_started

    def _reject_head(self) -> None:
        text = f"The request line and headers are larger than the limit of {self._limits.max_head_bytes} bytes."
        self._reject("headers_too_large", text)

    def _reject(self, code: str, message: str) -> None:
        """Answer without the application, then let go of the connection."""
        if self._rejected:
            return
        self._rejected = True
        self._cancel_receipt()
        if self._reading_body():
            # The request that is being read is the one at fault: it ends, and this is its answer.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif self._answering():
            # Another request's answer is under way: a second one in the middle of it would be read as its text.
            self.transport.close()
            self._arm_stall()
            return
        status = STATUS[code]
        body = error_body(code, [Problem(None, message)])
        lines = [STATUS_LINE[status]]
        lines += [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        lines.append(b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body))
        lines.append(b"connection: close\r\n\r\n")
        self.transport.write(b"".join([*lines, body]))
        self._on_reject(status)
        # What the client still sends is read and dropped for a moment: closing on unread bytes would reset the
        # connection and could take the answer with it.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._receipt_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    # Timers

    def _arm_receipt(self) -> None:
        if self._receipt_timer is None:
            self._receipt_timer = self.loop.call_later(self._limits.receipt_seconds, self._receipt_expired)

    def _cancel_receipt(self) -> None:
        if self._receipt_timer is not None:
            self._receipt_timer.cancel()
            self._receipt_timer = None

    def _receipt_expired(self) -> None:
        self._receipt_timer = None
        if self._part == "head" and self._fed_head_bytes:
            self._reject("timeout", f"The headers did not arrive within {self._limits.receipt_seconds:g} seconds.")
        elif not self._answering():
            self.transport.close()
            self._arm_stall()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_stall()

    def resume_writing(self) -> None:
        self._cancel_stall()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._arm_stall()

    def _arm_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)

    def _cancel_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _until_the_end(cycle: RequestResponseCycle, app: Any) -> Any:
    """The application for a client of HTTP/1.0: an answer without a length ends with the connection, since chunks are
    not known there (RFC 9112, section 6.1); the base class sends them all the same."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_plain(message: Any) -> None:
            if message["type"] == "http.response.start":
                if all(name.lower() != b"content-length" for name, _ in message["headers"]):
                    cycle.chunked_encoding = False
            elif cycle.chunked_encoding is False and not cycle.expected_content_length:
                # Every piece is announced as it comes.
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return answer

"""Raw sockets: what arrives slowly, is too large, is broken off, comes twice at once, or is never read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from server.engine.request import FinishReason
from server.generation import ChoiceFinished, Event, GenerationRequest, Started, TextDelta
from tests.server.http.conftest import LIMITS
from tests.server.http.scripted import ServerThread, completed, endless, never
from tests.server.http.wire import Connection, get, post, wait_for

OK = {"prompt": "x"}
STREAM = {"prompt": "x", "stream": True}


# The body


def test_slow_body(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        began = time.monotonic()
        connection.send(post(b'{"prom', length=100))
        answer = connection.answer()
        assert 0.4 < time.monotonic() - began < 3
        assert (answer.status, answer.error["code"]) == (408, "timeout")
        assert connection.at_end()


def test_body_that_drips(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b"", length=1000))
        for _ in range(4):
            connection.send(b" ")
            time.sleep(0.2)
        assert connection.answer().status == 408


def test_large_body_is_refused_by_its_declared_length(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b"", length=2**20 + 1))
        answer = connection.answer()
        assert (answer.status, answer.error["code"]) == (413, "too_large")
        assert str(2**20) in answer.error["message"]


def test_large_chunked_body_is_refused_while_it_arrives(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b"", "/generate", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(20):
            connection.send(chunk)
        assert connection.answer().status == 413


def test_a_refused_body_may_still_arrive_and_the_connection_go_on(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        body = b" " * (2**20 + 100)
        connection.send(post(body))
        assert connection.answer().status == 413
        connection.send(post(OK))
        assert connection.answer().status == 200


def test_a_refused_body_that_never_arrives_is_not_waited_for(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b"", length=2**21))
        assert connection.answer().status == 413
        began = time.monotonic()
        assert connection.at_end()
        assert time.monotonic() - began < 3


def test_body_up_to_the_limit(server: ServerThread) -> None:
    body = b'{"prompt": "' + b"x" * (2**20 - 14) + b'"}'
    assert len(body) == 2**20
    with Connection(server.port) as connection:
        connection.send(post(body))
        assert connection.answer().status == 200


def test_truncated_body(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b'{"prompt"', length=100))
    before = outcome(server, "cancelled")
    wait_for(lambda: outcome(server, "cancelled") >= before)
    assert server.service.seen == []


def outcome(server: ServerThread, name: str) -> float:
    text = server.metrics.render(None)[0].decode()
    prefix = f'stet_requests_total{{endpoint="/generate",outcome="{name}"}} '
    return next(float(line[len(prefix) :]) for line in text.splitlines() if line.startswith(prefix))


def test_chunked_body(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b'5\r\n{"pro\r\n9\r\nmpt":"x"}\r\n0\r\n\r\n', "/generate", "Transfer-Encoding: chunked"))
        assert connection.answer().status == 200


def test_expect_continue(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b"", "/generate", "Expect: 100-continue", length=15))
        assert connection.answer().status == 100
        connection.send(b'{"prompt": "x"}')
        assert connection.answer().status == 200


@pytest.mark.parametrize(
    "kind",
    [
        "Content-Type: text/plain",
        "Content-Type: application/x-www-form-urlencoded",
        "Content-Type: application/json; charset=latin-1",
        "X-Nothing: 1",
    ],
)
def test_content_type(server: ServerThread, kind: str) -> None:
    with Connection(server.port) as connection:
        connection.send(post(OK).replace(b"Content-Type: application/json", kind.encode()))
        answer = connection.answer()
        assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


def test_compressed_body(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b"\x1f\x8b", "/generate", "Content-Encoding: gzip"))
        assert connection.answer().status == 415


def test_content_type_with_charset(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(OK).replace(b"/json", b'/JSON ; charset="UTF-8"'))
        assert connection.answer().status == 200


# The head


def test_large_header(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("/livez", "GET", "X-Long: " + "x" * 17_000))
        answer = connection.answer()
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
        assert answer.headers["connection"] == "close"
        assert connection.at_end()


def test_header_without_an_end(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(b"GET /livez HTTP/1.1\r\nX-Long: ")
        for _ in range(40):
            connection.send(b"x" * 1000)
        assert connection.answer().status == 431


def test_many_headers(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("/livez", "GET", *(f"X-{number}: y" for number in range(5000))))
        assert connection.answer().status == 431


def test_long_url(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("/" + "a" * 20_000))
        assert connection.answer().status == 431


def test_headers_up_to_the_limit(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("/livez", "GET", "X-Long: " + "x" * 16_000))
        assert connection.answer().status == 200
        connection.send(get("/livez"))
        assert connection.answer().status == 200


def test_large_header_on_a_used_connection(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("/livez"))
        connection.answer()
        connection.send(get("/livez", "GET", "X-Long: " + "x" * 400_000))
        assert connection.answer().status == 431


def test_slow_header(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        for _ in range(4):
            connection.send(b"GET")
            time.sleep(0.2)
        answer = connection.answer()
        assert (answer.status, answer.error["code"]) in {(408, "timeout"), (400, "invalid_request")}
    with Connection(server.port) as connection:
        connection.send(b"GET /livez HTTP/1.1\r\nHost:")
        assert connection.answer().status == 408
        assert connection.at_end()


def test_silent_socket_is_closed(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        began = time.monotonic()
        assert connection.at_end()
        assert time.monotonic() - began < 3


def test_empty_lines_do_not_hold_a_connection(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("/livez"))
        connection.answer()
        connection.send(b"\r\n")
        began = time.monotonic()
        assert connection.at_end()
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nBad\x00Name: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nHOST: x\r\n\r\n",
    ],
)
def test_no_http(server: ServerThread, data: bytes) -> None:
    with Connection(server.port) as connection:
        connection.send(data)
        answer = connection.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        assert connection.at_end()


# Routes and methods


@pytest.mark.parametrize(
    "path", ["//", "//generate", "/generate/", "/v1/embeddings/", "/docs", "/openapi.json", "/%2e%2e/x", "*", "/<b>"]
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_unknown_route(server: ServerThread, path: str, method: str) -> None:
    with Connection(server.port) as connection:
        connection.send(get(path, method))
        answer = connection.answer()
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert set(answer.error) == {"message", "type", "param", "code", "details"}
        assert "<" not in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/generate", "POST"),
        ("HEAD", "/generate", "POST"),
        ("OPTIONS", "/generate", "POST"),
        ("PUT", "/generate", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("DELETE", "/livez", "GET, HEAD"),
    ],
)
def test_wrong_method(server: ServerThread, method: str, path: str, allow: str) -> None:
    with Connection(server.port) as connection:
        connection.send(get(path, method))
        answer = connection.answer(head=method == "HEAD")
        assert answer.status == 405
        assert answer.headers["allow"] == allow
        if method != "HEAD":
            assert answer.error["code"] == "method_not_allowed"


def test_embeddings_are_known_and_not_served(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post({"model": "m", "input": "x"}, "/v1/embeddings"))
        answer = connection.answer()
    assert (answer.status, answer.error["code"]) == (501, "unsupported")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics", "/info", "/v1/models"])
def test_head(server: ServerThread, path: str) -> None:
    with Connection(server.port) as connection:
        connection.send(get(path, "HEAD"))
        answer = connection.answer(head=True)
        assert answer.status == 200
        assert int(answer.headers["content-length"]) > 0
        connection.send(get("/livez"))
        assert connection.answer().body == b'{"status":"ok"}'


def test_absolute_url_and_query(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(get("http://test/livez?x=1"))
        assert connection.answer().status == 200


def test_readiness_follows_the_state(server: ServerThread) -> None:
    for state, status in (("ready", 200), ("loading", 503), ("draining", 503), ("failed", 503)):
        server.service.state = state
        for path in ("/readyz", "/health"):
            with Connection(server.port) as connection:
                connection.send(get(path))
                answer = connection.answer()
                assert answer.status == status
                assert answer.body == b'{"status":"%s"}' % state.encode()
        with Connection(server.port) as connection:
            connection.send(get("/livez"))
            assert connection.answer().status == 200


def test_an_upgrade_that_is_not_taken_does_not_lose_the_body(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA")
        connection.send(post(OK, "/generate", *upgrade) + get("/livez"))
        assert connection.answer().status == 200
        assert connection.answer().body == b'{"status":"ok"}'
    with Connection(server.port) as connection:
        request = post(OK, "/generate", *upgrade)
        for start in range(0, len(request), 7):
            connection.send(request[start : start + 7])
            time.sleep(0.002)
        assert connection.answer().status == 200


def test_connect(server: ServerThread) -> None:
    for target in ("/livez", "example.org:80"):
        with Connection(server.port) as connection:
            connection.send(get(target, "CONNECT"))
            assert connection.answer().status in (400, 405)


# Several requests on one connection


@pytest.mark.parametrize(
    "rest",
    [b"zz\r\n", b"3\r\nabcdef\r\n", b"0\r\nContent-Length: 1\r\n\r\n", b"0\r\nX: " + b"y" * 20_000 + b"\r\n\r\n"],
)
def test_a_body_whose_chunks_are_none_is_told_so(server: ServerThread, rest: bytes) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Connection(server.port) as connection:
        connection.send(head)
        connection.send(b"2\r\n{}\r\n" + rest)
        assert connection.answer().status in (400, 431)
        assert connection.at_end()
    wait_for(lambda: server.service.num_open == 0)


def test_a_client_of_http_1_0_gets_no_chunks(server: ServerThread) -> None:
    for body in (STREAM, OK):
        with Connection(server.port) as connection:
            connection.send(post(body).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            head = connection.read_until(b"\r\n\r\n").lower()
            assert b"transfer-encoding" not in head
            assert b"connection: close" in head
            rest = connection.rest()
            assert rest.startswith(b"id: 0\ndata: {" if body is STREAM else b"{")
            assert rest.endswith(b"data: [DONE]\n\n" if body is STREAM else b"}")


def test_pipelining(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(OK) + get("/livez") + post(OK | {"request_id": "third"}))
        assert connection.answer().status == 200
        assert connection.answer().body == b'{"status":"ok"}'
        assert b'"id":"third"' in connection.answer().body


def test_too_many_pipelined_requests(server: ServerThread) -> None:
    server.service.script = endless
    with Connection(server.port) as connection:
        connection.send(post(STREAM) + get("/livez") * 40)
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.answer()
    wait_for(lambda: server.service.num_open == 0)


def test_garbage_behind_a_running_stream_ends_it_without_a_second_answer(server: ServerThread) -> None:
    server.service.script = endless
    with Connection(server.port) as connection:
        connection.send(post(STREAM))
        connection.read_until(b'"text":"word "')
        connection.send(b"\x00\x01\x02\r\n\r\n")
        with pytest.raises((EOFError, ConnectionResetError)) as end:
            connection.read_until(b"HTTP/1.1")
        assert b"400" not in b"".join(end.value.args[:1] if isinstance(end.value, EOFError) else [])
    wait_for(lambda: server.service.num_open == 0)


# The client leaves


@pytest.mark.parametrize("body", [OK, STREAM], ids=["answer", "stream"])
def test_leave_before_the_first_token(server: ServerThread, body: dict[str, object]) -> None:
    server.service.script = never
    with Connection(server.port) as connection:
        connection.send(post(body))
        wait_for(lambda: server.service.num_open == 1)
    assert wait_for(lambda: server.service.num_open == 0) < 0.5


@pytest.mark.parametrize("body", [OK, STREAM], ids=["answer", "stream"])
def test_leave_in_the_middle(server: ServerThread, body: dict[str, object]) -> None:
    server.service.script = endless
    with Connection(server.port) as connection:
        connection.send(post(body))
        wait_for(lambda: server.service.num_open == 1)
        time.sleep(0.1)
    assert wait_for(lambda: server.service.num_open == 0) < 0.5


def test_leave_after_the_headers_in_the_queue(server: ServerThread) -> None:
    server.service.script = never
    with Connection(server.port) as connection:
        connection.send(post(STREAM))
        assert b"200 OK" in connection.read_until(b"\r\n\r\n")
        assert server.service.num_open == 1
    assert wait_for(lambda: server.service.num_open == 0) < 0.5


def test_leave_with_a_pipelined_request_behind(server: ServerThread) -> None:
    server.service.script = endless
    with Connection(server.port) as connection:
        connection.send(post(STREAM) + get("/livez"))
        connection.read_until(b'"text":"word "')
    assert wait_for(lambda: server.service.num_open == 0) < 1.0


def test_leave_in_the_middle_of_the_body(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post(b'{"prompt"', length=50))
        time.sleep(0.05)
    with Connection(server.port) as connection:
        connection.send(post(OK))
        assert connection.answer().status == 200
    assert len(server.service.seen) == 1


def test_a_reader_that_stalls_is_cut_off(server: ServerThread) -> None:
    num_taken = 0

    async def flood(request: GenerationRequest) -> AsyncIterator[Event]:
        nonlocal num_taken
        yield Started("gen-1", "tiny", 7)
        while True:
            yield TextDelta(0, "word " * 4000, (5,))
            num_taken += 1
            await asyncio.sleep(0)

    server.service.script = flood
    with Connection(server.port, receive_buffer=4096) as connection:
        began = time.monotonic()
        connection.send(post(STREAM))
        wait_for(lambda: server.service.num_open == 1)
        wait_for(lambda: server.service.num_open == 0, 10)
        assert time.monotonic() - began > LIMITS.stall_seconds * 0.9
    assert num_taken < 500, "what is not read is not asked for: 20 kB each, and the system's buffers hold some MB"


def test_an_answer_that_nobody_reads_does_not_keep_its_connection(server: ServerThread) -> None:
    """It is complete and the connection is closing: that waits for the rest to be read, but not for ever."""
    size = 16 * 2**20

    async def large(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Started("gen-1", "tiny", 7)
        yield TextDelta(0, "x" * size, (5,))
        yield ChoiceFinished(0, FinishReason.LENGTH)
        yield completed()

    server.service.script = large
    with Connection(server.port, receive_buffer=4096) as connection:
        connection.send(post(OK, "/generate", "Connection: close"))
        time.sleep(LIMITS.stall_seconds + 0.5)
        arrived = 0
        with contextlib.suppress(ConnectionResetError):
            while data := connection.sock.recv(2**20):
                arrived += len(data)
    assert arrived < size


def test_a_slow_reader_loses_nothing(server: ServerThread) -> None:
    count = 300

    async def flood(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Started("gen-1", "tiny", 7)
        for number in range(count):
            yield TextDelta(0, f"<{number}>" + "x" * 20_000, (5,))
        yield ChoiceFinished(0, FinishReason.LENGTH)
        yield completed()

    server.service.script = flood
    with Connection(server.port, receive_buffer=4096) as connection:
        connection.send(post(STREAM))
        time.sleep(0.3)
        body = connection.answer().body
    assert body.count(b"\nid: ") == count + 2
    assert all(f"<{number}>".encode() in body for number in range(count))
    assert body.endswith(b"data: [DONE]\n\n")


def test_bodies_that_arrive_share_one_bound(server: ServerThread) -> None:
    """Halves of bodies fill it; then whoever sends more is refused, and what is complete or gone makes room."""
    count = LIMITS.max_intake_bytes // 2**19
    piece = post(b" " * (2**19 - 1000), length=2**20)
    connections = [Connection(server.port) for _ in range(count + 4)]
    try:
        for connection in connections:
            connection.send(piece)
        answers = [connection.answer() for connection in connections]
        refused = [answer for answer in answers if answer.status == 429]
        assert len(refused) >= 3
        assert all(answer.error["code"] == "queue_full" and answer.headers["retry-after"] for answer in refused)
        assert {answer.status for answer in answers} <= {408, 429}
        with Connection(server.port) as other:  # what comes in one piece is never held
            other.send(post(OK))
            assert other.answer().status == 200
    finally:
        for connection in connections:
            connection.sock.close()

    def has_room() -> bool:
        with Connection(server.port) as connection:
            connection.send(post(b" " * 600_000 + b'{"prompt": "x"}'))
            return connection.answer().status == 200

    wait_for(has_room)

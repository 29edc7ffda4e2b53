"""What a client sends never becomes a line of the log, a header, or a label: on every route and method."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from server.http.routes import ROUTES
from server.logs import JsonFormatter, TextFormatter
from tests.server.http.scripted import ServerThread
from tests.server.http.wire import Connection, get, post, wait_for

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "QUERY", "X" * 40)
MARK = "evil"
# Escapes and raw characters that end a line, begin a header, or move a terminal's cursor.
EVIL = f"{MARK}\r\nX-{MARK}: 1\r\n\r\n{MARK}\x1b[31m\x85\u2028{MARK}"
ESCAPED = f"{MARK}%0d%0aX-{MARK}:%201%0d%0a%0d%0a{MARK}%1b%5b31m%00{MARK}"


@pytest.fixture
def lines() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Everything that is logged, in both forms."""
    outputs = (io.StringIO(), io.StringIO())
    handlers = [logging.StreamHandler(output) for output in outputs]
    handlers[0].setFormatter(JsonFormatter())
    handlers[1].setFormatter(TextFormatter())
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    for handler in handlers:
        root.addHandler(handler)
    yield outputs
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)


def check_log(lines: tuple[io.StringIO, io.StringIO], count: int) -> None:
    # A line is written once its answer is out.
    wait_for(lambda: min(output.getvalue().count("\n") for output in lines) >= count)
    as_json, as_text = (output.getvalue() for output in lines)
    assert MARK not in as_json
    assert MARK not in as_text
    assert as_json.count("\n") == as_text.count("\n")
    for line in as_json.splitlines():
        json.loads(line)
    for line in as_text.split("\n"):
        assert line == "" or line.isprintable(), line


@pytest.mark.parametrize("route", [*ROUTES, "/", "/nothing", "/v1/models/x"])
def test_requests_leave_no_mark(server: ServerThread, lines: tuple[io.StringIO, io.StringIO], route: str) -> None:
    headers = (f"User-Agent: {MARK}", f"Referer: {MARK}", f"X-Request-Id: {MARK}", f"Host: {MARK}")
    sent = 0
    for method in METHODS:
        for path in (f"{route}?x={ESCAPED}", f"{route}{ESCAPED}", f"{route}/{ESCAPED}"):
            with Connection(server.port) as connection:
                connection.send(get(path, method, *headers))
                answer = connection.answer(head=method == "HEAD")
            sent += answer.status != 400  # a method that is none
            assert not any(MARK in name or MARK in value for name, value in answer.headers.items())
            assert MARK not in answer.body.decode()
    check_log(lines, sent)


def test_values_come_back_as_json_and_stay_out_of_the_log(
    server: ServerThread, lines: tuple[io.StringIO, io.StringIO]
) -> None:
    bodies = [
        {"prompt": EVIL},
        {"prompt": "x", EVIL: 1},
        {"prompt": "x", "temperature": EVIL},
        {"prompt": "x", "stop": [EVIL, ""]},
        {"prompt": "x", "cache_salt": EVIL},
        {"prompt": "x", "request_id": EVIL},
        {"prompt": "x", "logit_bias": {EVIL: 1}},
        {"messages": [{"role": EVIL, "content": EVIL, EVIL: EVIL}]},
        {"model": EVIL, "prompt": EVIL},
        {"config": {EVIL: EVIL}, "device": EVIL},
        {"tokens": [EVIL]},
    ]
    sent = 0
    for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/plan"):
        for body in bodies:
            with Connection(server.port) as connection:
                connection.send(post(body, path))
                answer = connection.answer()
            sent += 1
            assert not any(MARK in name or MARK in value for name, value in answer.headers.items())
            assert answer.status in (200, 400, 404), answer.body
            json.loads(answer.body)
            assert b"\r" not in answer.body
            assert b"\x1b" not in answer.body
    check_log(lines, sent)


def test_an_own_request_id_is_printable_and_no_header(server: ServerThread) -> None:
    with Connection(server.port) as connection:
        connection.send(post({"prompt": "x", "request_id": "mine: <b>\u00e9"}))
        answer = connection.answer()
    assert json.loads(answer.body)["id"] == "mine: <b>\u00e9"
    assert "mine" not in str(answer.headers)


def test_labels_are_ours(server: ServerThread) -> None:
    for method, path in (("GET", f"/{ESCAPED}"), ("EVIL", "/generate"), ("GET", f"/v1/models/{ESCAPED}")):
        with Connection(server.port) as connection:
            connection.send(get(path, method))
            connection.answer()
    assert MARK not in server.metrics.render(None)[0].decode().lower()

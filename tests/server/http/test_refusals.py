"""Refusals for lack of a place: answered before anything of the body is looked at, and sparingly logged."""

from __future__ import annotations

import logging

import httpx
import pytest

from server.generation import Problem, Refusal
from server.logs import SparingLog
from tests.server.http.scripted import ServerThread
from tests.server.http.wire import Connection, post

FULL = Refusal("queue_full", [Problem(None, "All 12 places are taken.")], 7)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_where_no_place_is_left_the_body_is_not_read(server: ServerThread, client: httpx.Client, path: str) -> None:
    server.service.refusal = FULL
    try:
        answer = client.post(path, content=b"{not JSON", headers={"content-type": "text/plain"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert answer.json()["error"]["code"] == "queue_full"
        assert "12 places" in answer.json()["error"]["message"]
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200, "no place is needed for that"
        # Nor is it waited for; and what comes of it later is not taken for another request.
        with Connection(server.port) as connection:
            connection.send(post(b'{"prompt"', path, length=200))
            assert connection.answer().status == 429
            connection.send(b"x" * 191 + post({"prompt": "x"}, "/tokenize"))
            assert connection.answer().status == 200
    finally:
        server.service.refusal = None
    assert client.post(path, content=b"{not JSON", headers={"content-type": "application/json"}).status_code == 400


def test_a_flood_of_refusals_is_counted_and_not_written_out(
    server: ServerThread, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    server.service.refusal = FULL
    name = 'stet_requests_total{endpoint="/generate",outcome="queue_full"}'

    def counted() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), 0.0)

    before = counted()
    try:
        with caplog.at_level(logging.INFO, "stet.request"):
            for _ in range(60):
                client.post("/generate", json={"prompt": "x"})
    finally:
        server.service.refusal = None
    assert counted() - before == 60
    written = [record for record in caplog.records if record.name == "stet.request"]
    assert 0 < len(written) < 60


def test_lines_that_are_left_out_are_counted_in_the_next() -> None:
    log = SparingLog(2)
    assert [log.line(at) for at in (1.0, 1.1, 1.2, 1.9, 2.0, 2.1, 2.2, 3.5)] == [0, 0, None, None, 2, 0, None, 1]

"""Answers and streams, byte for byte; failures before and after the headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.engine.request import FinishReason
from server.generation import ChoiceFinished, Event, GenerationRequest, Problem, Refusal, Started, TextDelta
from tests.server.http.scripted import ServerThread, completed

BODY: dict[str, Any] = {"prompt": "Once"}
STREAM: dict[str, Any] = {"prompt": "Once", "stream": True}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "cached_tokens": 0}
TIMINGS = {"queue_ms": 0.1, "prefill_ms": 9.0, "decode_ms": 80.25, "total_ms": 89.35}


def test_answer(client: httpx.Client) -> None:
    answer = client.post("/generate", json=BODY)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "id": "gen-1",
        "model": "tiny",
        "seed": 7,
        "outputs": [{"index": 0, "text": "a tale\n", "finish_reason": "length", "stop_reason": None}],
        "usage": USAGE,
        "timings": TIMINGS,
    }


def test_answer_with_token_ids(client: httpx.Client) -> None:
    answer = client.post("/generate", json=BODY | {"return_token_ids": True})
    assert answer.json()["outputs"][0]["token_ids"] == [5, 6]


def test_stream_bytes(client: httpx.Client) -> None:
    answer = client.post("/generate", json=STREAM)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    usage = json.dumps(USAGE, separators=(",", ":"))
    timings = json.dumps(TIMINGS, separators=(",", ":"))
    assert answer.content.decode() == (
        'id: 0\ndata: {"id":"gen-1","index":0,"text":"a"}\n\n'
        'id: 1\ndata: {"id":"gen-1","index":0,"text":" tale\\n"}\n\n'
        'id: 2\ndata: {"id":"gen-1","index":0,"text":"","finish_reason":"length","stop_reason":null}\n\n'
        f'id: 3\ndata: {{"id":"gen-1","seed":7,"usage":{usage},"timings":{timings}}}\n\n'
        "id: 4\ndata: [DONE]\n\n"
    )


def test_stream_with_token_ids(client: httpx.Client) -> None:
    text = client.post("/generate", json=STREAM | {"return_token_ids": True}).text
    assert 'data: {"id":"gen-1","index":0,"text":"a","token_ids":[5]}' in text


def test_tokens_without_text_yet(client: httpx.Client, server: ServerThread) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Started("gen-1", "tiny", 7)
        yield TextDelta(0, "", (5,))
        yield TextDelta(0, "é", (6,))
        yield ChoiceFinished(0, FinishReason.STOP, 2)
        yield completed()

    server.service.script = script
    plain = client.post("/generate", json=STREAM).text
    assert plain.count('"text":"') == 2
    assert "id: 3\ndata: [DONE]" in plain
    with_ids = client.post("/generate", json=STREAM | {"return_token_ids": True}).text
    assert '"text":"","token_ids":[5]' in with_ids
    assert '"finish_reason":"stop","stop_reason":2' in with_ids
    assert "id: 4\ndata: [DONE]" in with_ids


async def two_choices(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("gen-1", "tiny", 7)
    yield TextDelta(1, "b", (6,))
    yield TextDelta(0, "a", (5,))
    yield ChoiceFinished(1, FinishReason.STOP, "x")
    yield TextDelta(0, "c", (7,))
    yield ChoiceFinished(0, FinishReason.LENGTH)
    yield completed(generated=3)


def test_choices(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = two_choices
    outputs = client.post("/generate", json=BODY | {"n": 2}).json()["outputs"]
    assert outputs == [
        {"index": 0, "text": "ac", "finish_reason": "length", "stop_reason": None},
        {"index": 1, "text": "b", "finish_reason": "stop", "stop_reason": "x"},
    ]
    events = events_of(client.post("/generate", json=STREAM | {"n": 2}).text)
    assert [event.get("index") for event in events] == [1, 0, 1, 0, 0, None]
    assert [event["finish_reason"] for event in events if "finish_reason" in event] == ["stop", "length"]


def test_an_error_ends_every_choice_that_is_open(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = breaks_off
    events = events_of(client.post("/generate", json=STREAM | {"n": 3}).text)
    ends = [(event["index"], event["finish_reason"]) for event in events if "finish_reason" in event]
    assert ends == [(0, "error"), (1, "error"), (2, "error")]


@pytest.mark.parametrize(
    ("code", "status", "retry_after"),
    [
        ("invalid_request", 400, None),
        ("context_length_exceeded", 400, None),
        ("queue_full", 429, "7"),
        ("loading", 503, "2"),
        ("draining", 503, "5"),
        ("engine_restarting", 503, "2"),
        ("unsupported", 501, None),
        ("internal", 500, None),
    ],
)
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["answer", "stream"])
def test_refusals_are_statuses(
    client: httpx.Client, server: ServerThread, body: dict[str, Any], code: Any, status: int, retry_after: str | None
) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        raise Refusal(code, [Problem("prompt", "No.", "x" * 100, "less")], 7 if code == "queue_full" else None)
        yield completed()

    server.service.script = script
    answer = client.post("/generate", json=body)
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "details"}
    assert (error["code"], error["message"], error["param"]) == (code, "No.", "prompt")
    assert error["details"] == [{"param": "prompt", "message": "No.", "value": "x" * 64 + "…", "allowed": "less"}]


def test_engine_error_is_a_status_without_a_stream(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = breaks_off
    answer = client.post("/generate", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert answer.json()["error"]["message"] == "The engine went down twice."


async def breaks_off(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("gen-1", "tiny", 7)
    yield TextDelta(0, "a", (5,))
    yield ChoiceFinished(0, FinishReason.ERROR, error="The engine went down twice.")
    yield completed()


def test_engine_error_in_a_stream_is_an_event_without_done(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = breaks_off
    answer = client.post("/generate", json=STREAM)
    assert answer.status_code == 200
    events = events_of(answer.text)
    assert events[1] == {"id": "gen-1", "index": 0, "text": "", "finish_reason": "error", "stop_reason": None}
    assert events[2]["error"]["message"] == "The engine went down twice."
    assert len(events) == 3
    assert "[DONE]" not in answer.text


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["answer", "stream"])
def test_a_defect_never_reaches_the_client(
    client: httpx.Client, server: ServerThread, body: dict[str, Any], after: int
) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        events = [Started("gen-1", "tiny", 7), TextDelta(0, "a", (5,))]
        for event in events[:after]:
            yield event
        raise RuntimeError("secret in /home/someone")

    server.service.script = script
    answer = client.post("/generate", json=body)
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    if body is BODY or after == 0:
        assert answer.status_code == 500
        error = answer.json()["error"]
    else:
        assert answer.status_code == 200
        assert "[DONE]" not in answer.text
        error = events_of(answer.text)[-1]["error"]
    assert error["code"] == "internal"
    assert "X-Request-Id" in error["message"]
    assert answer.headers["x-request-id"].startswith("req-")


def test_a_defect_in_the_checks_is_counted(
    client: httpx.Client, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(request: GenerationRequest) -> list[Problem]:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.service, "problems", broken)
    line = 'stet_requests_total{endpoint="/generate",outcome="internal"} '
    before = float(server.metrics.render(None)[0].decode().split(line)[1].split()[0])
    answer = client.post("/generate", json=BODY)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert float(server.metrics.render(None)[0].decode().split(line)[1].split()[0]) == before + 1


def test_headers_go_out_after_a_long_wait_and_a_refusal_becomes_an_event(
    client: httpx.Client, server: ServerThread
) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        await asyncio.sleep(1.0)
        raise Refusal("engine_restarting", [Problem(None, "Later.")])
        yield completed()

    server.service.script = script
    answer = client.post("/generate", json=STREAM)
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    assert lines[0] == ": keep-alive"
    events = events_of(answer.text)
    assert events[0]["finish_reason"] == "error"
    assert events[1]["error"]["code"] == "engine_restarting"
    assert "[DONE]" not in answer.text


def test_keep_alive_in_a_silence(client: httpx.Client, server: ServerThread) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Started("gen-1", "tiny", 7)
        yield TextDelta(0, "a", (5,))
        await asyncio.sleep(1.2)
        yield ChoiceFinished(0, FinishReason.CANCELLED)
        yield completed()

    server.service.script = script
    text = client.post("/generate", json=STREAM).text
    assert 1 <= text.count(": keep-alive\n\n") <= 3
    assert '"finish_reason":"cancelled"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_what_the_service_is_asked(client: httpx.Client, server: ServerThread) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_new_tokens": 5,
        "do_sample": False,
        "top_k": -1,
        "n": 3,
        "stop": "x",
        "logit_bias": {"5": -1},
        "priority": -3,
        "cache_salt": "s",
        "request_id": "mine",
    }
    answer = client.post("/generate", json=body)
    assert answer.json()["id"] == "mine"
    assert server.service.seen == [
        GenerationRequest(
            messages=({"role": "user", "content": "Hi"},),
            max_new_tokens=5,
            temperature=0.0,
            top_k=0,
            n=3,
            stop=("x",),
            logit_bias={5: -1.0},
            priority=-3,
            cache_salt="s",
            request_id="mine",
        )
    ]


def test_all_problems_at_once(client: httpx.Client, server: ServerThread) -> None:
    server.service.found = [
        Problem("top_k", "top_k is above the vocabulary (8).", 9, "1 to 8"),
        Problem("temperature", "A second opinion.", 3),
    ]
    body = {
        "prompt": "x",
        "messages": [{"role": "user", "contents": "y"}],
        "temperature": 3,
        "temprature": 1,
        "stop": ["a", ""],
        "top_k": 9,
        "n": 9,
        "regex": 2,
    }
    answer = client.post("/generate", json=body)
    assert answer.status_code == 400
    details = {item["param"]: item for item in answer.json()["error"]["details"]}
    assert set(details) == {
        "temprature",
        "messages[0].content",
        "messages[0].contents",
        "messages",
        "temperature",
        "stop[1]",
        "top_k",
        "n",
        "regex",
    }
    assert details["temprature"]["allowed"] == "temperature"
    assert details["messages[0].contents"]["message"].endswith("Did you mean content?")
    assert details["temperature"]["message"] == "temperature must be a number from 0 to 2."
    assert details["temperature"]["value"] == 3
    assert server.service.seen == []

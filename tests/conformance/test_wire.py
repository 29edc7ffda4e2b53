"""What comes back: the answer, the stream's bytes, every status, the books over many requests."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_engine import expected_tokens
from tests.server.http.launch import VOCABULARY, Launched, launched
from tests.server.http.wire import Connection, get, post, wait_for

IDS = [7, 8, 9]


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_answer(server: Launched) -> None:
    answer = server.generate(prompt_token_ids=IDS, max_new_tokens=12, seed=3, return_token_ids=True)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["id", "model", "seed", "outputs", "usage", "timings"]
    assert re.fullmatch(r"gen-\w+", body["id"])
    assert (body["model"], body["seed"]) == ("fake", 3)
    (output,) = body["outputs"]
    assert list(output) == ["index", "text", "finish_reason", "stop_reason", "token_ids"]
    assert output["token_ids"] == expected_tokens(IDS, 3, 12, vocab_size=VOCABULARY)
    assert (output["index"], output["finish_reason"], output["stop_reason"]) == (0, "length", None)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15, "cached_tokens": 0}
    assert list(body["timings"]) == ["queue_ms", "prefill_ms", "decode_ms", "total_ms"]
    assert all(value >= 0 for value in body["timings"].values())


def test_a_drawn_seed_is_returned_and_reproduces(server: Launched) -> None:
    first = server.generate(prompt_token_ids=IDS, max_new_tokens=12).json()
    second = server.generate(prompt_token_ids=IDS, max_new_tokens=12).json()
    assert 0 <= first["seed"] < 2**53
    assert first["seed"] != second["seed"]
    again = server.generate(prompt_token_ids=IDS, max_new_tokens=12, seed=first["seed"]).json()
    assert again["outputs"] == first["outputs"]


def test_stream_bytes(server: Launched) -> None:
    answer = server.generate(prompt_token_ids=IDS, max_new_tokens=6, seed=3, stream=True, request_id="mine")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    for number, block in enumerate(blocks):
        identifier, data = block.split("\n")
        assert identifier == f"id: {number}"
        assert data.startswith("data: ")
    *deltas, last, summary = events_of(answer.text)
    assert blocks[-1].endswith("data: [DONE]")
    for event in deltas:
        assert list(event) == ["id", "index", "text"]
        assert event["id"] == "mine"
        assert event["text"]
    assert last == {"id": "mine", "index": 0, "text": "", "finish_reason": "length", "stop_reason": None}
    assert list(summary) == ["id", "seed", "usage", "timings"]
    assert summary["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9, "cached_tokens": 0}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("options", [{}, {"stop": ["a", "\ufffd"]}, {"skip_special_tokens": False}], ids=str)
def test_the_texts_of_a_stream_are_the_text(server: Launched, seed: int, options: dict[str, Any]) -> None:
    sent = {"prompt_token_ids": [*IDS, seed], "max_new_tokens": 80, "seed": seed, "return_token_ids": True, **options}
    whole = server.generate(**sent).json()
    events = events_of(server.generate(stream=True, **sent).text)
    (output,) = whole["outputs"]
    assert "".join(event.get("text", "") for event in events) == output["text"]
    assert [token for event in events for token in event.get("token_ids", [])] == output["token_ids"]
    (last,) = (event for event in events if "finish_reason" in event)
    assert (last["finish_reason"], last["stop_reason"]) == (output["finish_reason"], output["stop_reason"])
    assert events[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == len(output["token_ids"])


def test_choices(server: Launched) -> None:
    sent = {"prompt_token_ids": IDS, "max_new_tokens": 12, "seed": 3, "n": 3, "return_token_ids": True}
    body = server.generate(**sent).json()
    expected = [expected_tokens(IDS, 3, 12, choice, VOCABULARY) for choice in range(3)]
    assert [output["token_ids"] for output in body["outputs"]] == expected
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 36, "total_tokens": 39, "cached_tokens": 0}
    events = events_of(server.generate(stream=True, **sent).text)
    for index, output in enumerate(body["outputs"]):
        own = [event for event in events if event.get("index") == index]
        assert "".join(event["text"] for event in own) == output["text"]
        assert [event["finish_reason"] for event in own if "finish_reason" in event] == ["length"]


def test_stops(server: Launched) -> None:
    sent = {"prompt_token_ids": IDS, "max_new_tokens": 80, "seed": 3, "return_token_ids": True}
    plain = server.generate(**sent).json()["outputs"][0]
    token = plain["token_ids"][10]
    stopped = server.generate(stop_token_ids=[token], **sent).json()["outputs"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", token)
    assert stopped["token_ids"][-1] == token
    assert plain["text"].startswith(stopped["text"])
    piece = plain["text"][8:11]
    cut = server.generate(stop=piece, **sent).json()["outputs"][0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", piece)
    assert cut["text"] == plain["text"][: plain["text"].index(piece)]
    kept = server.generate(stop=[piece], include_stop=True, **sent).json()["outputs"][0]
    assert kept["text"] == cut["text"] + piece


def test_info(server: Launched) -> None:
    answer = server.get("/info")
    assert answer.status_code == 200
    body = answer.json()
    assert body["identity"]["model"] == "fake"
    assert body["context_length"] == 512
    assert set(body["defaults"]) >= {"temperature", "top_k", "top_p", "max_new_tokens"}
    assert "/" not in json.dumps(body)


def test_statuses(server: Launched) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert server.get(path).status_code == 200
    assert server.get("/livez").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}

    def error(data: bytes) -> tuple[int, str, dict[str, str]]:
        with Connection(server.port) as connection:
            connection.send(data)
            answer = connection.answer()
            assert set(answer.error) == {"message", "type", "param", "code", "details"}
            assert answer.headers["content-type"] == "application/json"
            assert ".py" not in answer.error["message"]
            return answer.status, answer.error["code"], answer.headers

    assert error(post(b"{"))[:2] == (400, "invalid_request")
    assert error(b"nonsense\r\n\r\n")[:2] == (400, "invalid_request")
    assert error(get("/nothing"))[:2] == (404, "not_found")
    assert error(get("/v1/embeddings"))[:2] == (501, "unsupported")
    assert error(get("/v1/models/other"))[:2] == (404, "model_not_found")
    assert error(post({}, "/v1/chat/completions"))[:2] == (400, "invalid_request")
    status, code, headers = error(get("/generate"))
    assert (status, code, headers["allow"]) == (405, "method_not_allowed", "POST")
    assert error(post(b"", length=2**20 + 1))[:2] == (413, "too_large")
    assert error(post({}).replace(b"application/json", b"text/plain"))[:2] == (415, "unsupported_media_type")
    assert error(get("/livez", "GET", "X: " + "y" * 20_000))[:2] == (431, "headers_too_large")
    assert error(post({"prompt": "x", "best_of": 2}, "/v1/completions"))[:2] == (501, "unsupported")


def test_overload_is_429_before_any_header(tmp_path: Path) -> None:
    with launched(tmp_path, "--max-waiting", "1", max_running=1, step_seconds=0.02, max_model_len=100_000) as server:
        connections = [Connection(server.port) for _ in range(2)]
        for connection in connections:
            connection.send(post({"prompt": "x", "max_new_tokens": 90_000, "stream": True, "ignore_eos": True}))
            time.sleep(0.2)
        # A prompt that would take long to tokenize is refused as fast as a short one.
        for sent in ({"prompt": "y"}, {"prompt": "y" * 900_000, "stream": True}):
            answer = server.generate(**sent)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["content-type"] == "application/json"
        # Nor is anything in it looked at.
        assert server.generate(prompt="y", top_p=7).status_code == 429
        for path in ("/livez", "/readyz", "/metrics"):
            assert server.get(path).status_code == 200
        assert server.metric('stet_requests_total{endpoint="/generate",outcome="queue_full"}') == 3
        for connection in connections:
            connection.sock.close()
        # Both leave, one while it waits: their places are free at once.
        wait_for(lambda: server.metric("stet_requests_running") + server.metric("stet_requests_waiting") == 0, 3)
        assert server.metric('stet_requests_total{endpoint="/generate",outcome="cancelled"}') == 2
        assert server.generate(prompt="y", max_new_tokens=2).status_code == 200
        assert server.generate(prompt="y", top_p=7).status_code == 400


def test_an_engine_that_dies_and_a_request_that_kills_it(tmp_path: Path) -> None:
    with launched(
        tmp_path,
        "--max-crashes-per-minute",
        "100",
        poison_token=300,
        poison_position=5,
        step_seconds=0.01,
        load_seconds=0.3,
    ) as server:
        killer = server.generate(prompt_token_ids=[300], max_new_tokens=50)
        assert (killer.status_code, killer.json()["error"]["code"]) == (500, "internal")
        assert "twice" in killer.json()["error"]["message"]
        answer = server.generate(prompt="x", max_new_tokens=3)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "engine_restarting"
            assert int(answer.headers["retry-after"]) >= 1
            server.wait_for("/readyz", 200)
        stream = server.generate(prompt_token_ids=[300], max_new_tokens=50, stream=True, return_token_ids=True)
        events = events_of(stream.text)
        assert stream.status_code == 200
        assert [event["finish_reason"] for event in events if "finish_reason" in event] == ["error"]
        assert events[-1]["error"]["code"] == "internal"
        assert "[DONE]" not in stream.text
        server.wait_for("/readyz", 200)
        assert server.generate(prompt="x", max_new_tokens=3).status_code == 200
        assert server.metric("stet_engine_restarts_total") == 4
        assert server.metric('stet_requests_total{endpoint="/generate",outcome="error"}') == 2
        assert "Traceback" not in server.stderr


def test_every_request_has_one_outcome_and_every_token_one_count(tmp_path: Path) -> None:
    with launched(tmp_path, max_model_len=512, step_seconds=0.002) as server:
        sent = 0
        bodies: list[dict[str, Any]] = [
            {"prompt": "x", "max_new_tokens": 5},
            {"prompt": "x", "max_new_tokens": 50, "stop": "e"},
            {"prompt": "x", "max_new_tokens": 50, "stream": True, "stop": "a"},
            {"prompt": "x", "temperature": 5},
            {"prompt": "x" * 5000},
            {"prompt": "x", "n": 3, "max_new_tokens": 5},
            {},
        ]
        with httpx.Client(base_url=server.url, timeout=20) as client:
            for _ in range(3):
                for body in bodies:
                    client.post("/generate", json=body)
                    sent += 1
        for data in (
            *[post({"prompt": "x", "best_of": 2}, "/v1/completions")] * 3,
            post(b"{"),
            post(b"", length=2**21),
            post({}).replace(b"/json", b"/xml"),
        ):
            with Connection(server.port) as connection:
                connection.send(data)
                connection.answer()
            sent += 1
        for data in (
            post({"prompt": "x", "max_new_tokens": 500, "stream": True, "ignore_eos": True}),
            post({"prompt": "x", "max_new_tokens": 500, "ignore_eos": True}),
            post(b'{"prompt"', length=50),
        ):
            with Connection(server.port) as connection:
                connection.send(data)
                time.sleep(0.2)
            sent += 1
        server.get("/generate")

        def outcomes() -> dict[str, float]:
            return {
                sample.labels["outcome"]: sample.value
                for family in text_string_to_metric_families(server.get("/metrics").text)
                for sample in family.samples
                if sample.name == "stet_requests_total" and sample.value
            }

        wait_for(lambda: sum(outcomes().values()) == sent)
        assert outcomes()["cancelled"] == 3
        assert outcomes()["unsupported"] == 3
        assert outcomes()["context_length_exceeded"] == 3
        assert outcomes()["too_large"] == outcomes()["unsupported_media_type"] == 1
        wait_for(lambda: server.metric("stet_requests_running") == 0)

        def balanced() -> bool:
            discarded = sum(
                server.metric(f'stet_discarded_tokens_total{{reason="{reason}"}}')
                for reason in ("stop", "abort", "pipeline")
            )
            return server.metric("stet_engine_step_tokens_sum") == discarded + server.metric(
                "stet_generated_tokens_total"
            )

        wait_for(balanced)


def test_metrics_page(server: Launched) -> None:
    server.generate(prompt="x", max_new_tokens=3)
    plain = server.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {family.name for family in text_string_to_metric_families(plain.text)} >= {
        "stet_requests",
        "stet_build_info",
    }
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    openmetrics = httpx.get(server.url + "/metrics", headers=accept)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    assert server.metric('stet_http_requests_total{method="POST",route="/generate",status="200"}') >= 1

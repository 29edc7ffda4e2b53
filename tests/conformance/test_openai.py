"""The OpenAI-shaped routes of whole servers over a fake engine, and the page that describes them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from server.http.openai.schemas import (
    CHAT_UNSUPPORTED,
    COMPLETION_SHARED,
    COMPLETION_UNSUPPORTED,
    SHARED,
    ChatBody,
    CompletionBody,
)
from server.http.plan import PlanBody
from server.http.schemas import GenerateBody
from server.http.tokens import DetokenizeBody, TokenizeBody
from tests.conformance.conftest import CONTEXT
from tests.server.fake_engine import expected_tokens
from tests.server.http.launch import VOCABULARY, Launched, launched
from tests.server.http.wire import wait_for

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IDS = [7, 8, 9]


def ask(server: Launched, path: str, **body: Any) -> httpx.Response:
    return server.client.post(server.url + path, json=body)


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_both_dialects_give_the_same_text(server: Launched) -> None:
    options = {"max_tokens": 12, "seed": 3, "stop": "a"}
    (native,) = server.generate(prompt="Once", max_new_tokens=12, seed=3, stop="a").json()["outputs"]
    (choice,) = ask(server, COMPLETIONS, prompt="Once", **options).json()["choices"]
    assert {name: choice[name] for name in native} == native
    messages = [{"role": "user", "content": "Hi"}]
    (native,) = server.generate(messages=messages, max_new_tokens=12, seed=3, stop="a").json()["outputs"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    for sent in (messages, parts):
        (choice,) = ask(server, CHAT, messages=sent, **options).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (native["text"], native["finish_reason"])
        chunks = chunks_of(ask(server, CHAT, messages=sent, stream=True, **options))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == native["text"]


@pytest.mark.parametrize("n", [1, 3])
def test_several_prompts(server: Launched, n: int) -> None:
    prompts = [[*IDS, number] for number in range(5)]
    sent = {"prompt": prompts, "n": n, "max_tokens": 9, "seed": 3, "return_token_ids": True}
    body = ask(server, COMPLETIONS, **sent).json()
    expected = [expected_tokens(prompt, 3, 9, choice, VOCABULARY) for prompt in prompts for choice in range(n)]
    assert [choice["index"] for choice in body["choices"]] == list(range(5 * n))
    assert [choice["token_ids"] for choice in body["choices"]] == expected
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (20, 45 * n)
    *chunks, total = chunks_of(ask(server, COMPLETIONS, stream=True, stream_options={"include_usage": True}, **sent))
    assert total["usage"] == body["usage"]
    streamed: dict[int, list[int]] = {index: [] for index in range(5 * n)}
    ends: list[int] = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice.get("token_ids", [])
        if choice["finish_reason"]:
            ends.append(choice["index"])
    assert list(streamed.values()) == expected
    assert sorted(ends) == list(range(5 * n))
    drawn = ask(server, COMPLETIONS, prompt=["x", "x"], max_tokens=9).json()
    again = ask(server, COMPLETIONS, prompt=["x", "x"], max_tokens=9, seed=drawn["seed"]).json()
    assert drawn["choices"][0]["text"] == drawn["choices"][1]["text"]
    assert drawn["choices"] == again["choices"]


def test_one_bad_prompt_of_several_refuses_all(server: Launched) -> None:
    for prompt, param, code in (
        ([IDS, [VOCABULARY]], "prompt[1]", "invalid_request"),
        ([IDS, [5] * CONTEXT], "prompt[1]", "context_length_exceeded"),
        (["x", "x" * 5000], "prompt[1]", "context_length_exceeded"),
    ):
        for stream in (False, True):
            answer = ask(server, COMPLETIONS, prompt=prompt, stream=stream)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, code, param), answer.text
    answer = ask(server, COMPLETIONS, prompt=["x", ""], add_special_tokens=False)
    assert answer.json()["error"]["param"] == "prompt[1]"
    answer = ask(server, COMPLETIONS, prompt=IDS, max_tokens=CONTEXT - 3 + 1)
    assert answer.json()["error"]["param"] == "max_tokens"
    assert "max_new_tokens" not in answer.text


def test_places_are_for_all_choices_or_none(tmp_path: Path) -> None:
    with launched(tmp_path, "--max-waiting", "2", max_running=2, step_seconds=0.02, max_model_len=10_000) as server:
        assert ask(server, CHAT, messages=[{"role": "user", "content": "x"}], n=5).json()["error"]["param"] == "n"
        answer = ask(server, COMPLETIONS, prompt=["x", "y", "z"], n=2)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        assert ask(server, COMPLETIONS, prompt=["x", "y"], n=2, max_tokens=2).status_code == 200
        slow = {"prompt": ["x", "y", "z"], "max_tokens": 9000, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", server.url + COMPLETIONS, json=slow) as stream:
            assert stream.status_code == 200, stream.read()
            # Kept: httpx closes the connection with its iterator.
            lines = stream.iter_lines()
            next(lines)
            for sent in ({"prompt": "x", "n": 2}, {"prompt": ["x", "y"]}):
                answer = ask(server, COMPLETIONS, **sent)
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
                assert int(answer.headers["retry-after"]) >= 1
            wait_for(lambda: server.metric("stet_requests_running") + server.metric("stet_requests_waiting") == 3, 3)
        # The reader has left: the engine drops all three.
        wait_for(lambda: server.metric("stet_requests_running") + server.metric("stet_requests_waiting") == 0, 3)
        wait_for(lambda: server.metric(f'stet_requests_total{{endpoint="{COMPLETIONS}",outcome="cancelled"}}') == 3, 3)
        assert server.metric(f'stet_requests_total{{endpoint="{COMPLETIONS}",outcome="queue_full"}}') == 2
        assert ask(server, COMPLETIONS, prompt=["x", "y"], n=2, max_tokens=2).status_code == 200


def test_tokenize_and_detokenize(server: Launched) -> None:
    text = "é 🦊 <|im_end|> Once"
    answer = ask(server, "/tokenize", prompt=text, add_special_tokens=False).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == CONTEXT
    assert ask(server, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    messages = [{"role": "user", "content": "Hi"}]
    count = ask(server, "/tokenize", messages=messages).json()["count"]
    usage = server.generate(messages=messages, max_new_tokens=1).json()["usage"]
    assert count == usage["prompt_tokens"]
    for bad in ([VOCABULARY], [-1]):
        error = ask(server, "/detokenize", tokens=bad).json()["error"]
        assert error["param"].startswith("tokens")
        assert error["message"].startswith("tokens")
    assert ask(server, "/detokenize", tokens=[]).json() == {"prompt": ""}
    assert ask(server, "/tokenize", prompt="", add_special_tokens=False).json()["tokens"] == []


def test_models_while_loading_and_after(tmp_path: Path) -> None:
    with launched(tmp_path, load_seconds=2.5, ready=False) as server:
        server.wait_for("/livez", 200)
        for path in ("/v1/models", "/v1/models/fake"):
            assert server.get(path).json()["error"]["code"] == "loading"
        answer = ask(server, CHAT, messages=[{"role": "user", "content": "x"}])
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert ask(server, "/tokenize", prompt="x").status_code == 503
        server.wait_for("/readyz", 200)
        (model,) = server.get("/v1/models").json()["data"]
        assert model["id"] == "fake"
        assert time.time() - 60 < model["created"] <= time.time()


def test_the_fingerprint_is_of_the_identity(server: Launched) -> None:
    prints = {ask(server, COMPLETIONS, prompt="x", max_tokens=1).json()["system_fingerprint"] for _ in range(2)}
    (fingerprint,) = prints
    assert re.fullmatch(r"fp_[0-9a-f]{12}", fingerprint)


# The page and the code


def section(title: str) -> str:
    text = PAGE.read_text()
    start = text.index(f"\n## {title}\n")
    return text[start : text.index("\n## ", start + 1)]


@pytest.mark.parametrize(
    ("title", "body", "unsupported"),
    [
        ("`POST /v1/chat/completions`", ChatBody, CHAT_UNSUPPORTED),
        ("`POST /v1/completions`", CompletionBody, COMPLETION_UNSUPPORTED),
        ("`POST /tokenize`", TokenizeBody, {}),
        ("`POST /detokenize`", DetokenizeBody, {}),
        ("`POST /plan`", PlanBody, {}),
    ],
)
def test_the_page_says_what_the_code_does(title: str, body: type[BaseModel], unsupported: dict[str, Any]) -> None:
    text = section(title)
    for name, field in body.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        note = f"; {extra['note']}" if extra["note"] else ""
        assert f"\n| `{name}` | {extra['allowed']}{note} | {extra['shown']} |\n" in text
    for name, idle in unsupported.items():
        assert f"\n| `{name}` | {json.dumps(idle)} |\n" in text
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [*body.model_fields, *unsupported]


def test_the_page_lists_the_shared_parameters() -> None:
    for title, names in (("`POST /v1/chat/completions`", SHARED), ("`POST /v1/completions`", COMPLETION_SHARED)):
        listed = section(title).split("As on `/generate`: ", 1)[1].split(".\n", 1)[0]
        assert re.findall(r"`(\w+)`", listed) == list(names)
    assert set(COMPLETION_SHARED) <= set(GenerateBody.model_fields)

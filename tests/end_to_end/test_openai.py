"""The official `openai` client, unmodified, against a real server with the embedded model."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator

import openai
import pytest

from loadtests.processes import RunningServer
from tests.end_to_end.client import metrics

MODEL = "stet-tales"
TALE = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_chat(client: openai.OpenAI) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(model=MODEL, messages=TALE, max_completion_tokens=40, seed=5)  # type: ignore[arg-type]

    answer = ask()
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert len(choice.message.content.split()) > 15
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert re.fullmatch(r"fp_\w{12}", answer.system_fingerprint or "")
    assert answer.id.startswith("chatcmpl-")
    again = ask()
    assert again.choices == answer.choices
    assert again.system_fingerprint == answer.system_fingerprint
    # An answer may be sent back as it came.
    follow_up = [*TALE, choice.message, {"role": "user", "content": "And then?"}]
    reply = client.chat.completions.create(model=MODEL, messages=follow_up, max_tokens=5)  # type: ignore[arg-type]
    assert reply.choices[0].finish_reason in ("length", "stop")


def test_chat_stream_with_choices_and_usage(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": TALE, "max_completion_tokens": 30, "seed": 5, "n": 2, "temperature": 1.0}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    assert len({choice.message.content for choice in whole.choices}) == 2
    texts, roles, ends, usage = ["", ""], ["", ""], ["", ""], None
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)  # type: ignore[call-overload]
    for chunk in stream:
        for choice in chunk.choices:
            roles[choice.index] += choice.delta.role or ""
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason or ""
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant", "assistant"]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    # One prompt, two choices.
    assert usage.prompt_tokens == whole.usage.prompt_tokens < 40
    first = client.chat.completions.create(**options | {"n": 1})  # type: ignore[call-overload]
    assert first.choices[0].message.content == texts[0]


def test_completions(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "The fox"]
    extra = {"top_k": 20, "return_token_ids": True}
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=10, n=2, seed=1, extra_body=extra)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.token_ids) <= 10 for choice in answer.choices)  # type: ignore[attr-defined]
    stream = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=10, n=2, seed=1, stream=True, extra_body={"top_k": 20}
    )
    texts = [""] * 4
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]
    alone = client.completions.create(model=MODEL, prompt=prompts[1], max_tokens=10, seed=1, extra_body={"top_k": 20})
    assert alone.choices[0].text == texts[2]
    plain = client.completions.create(model=MODEL, prompt=prompts[0], max_tokens=30, temperature=0)
    piece = plain.choices[0].text[12:15]
    cut = client.completions.create(model=MODEL, prompt=prompts[0], max_tokens=30, temperature=0, stop=[piece])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == plain.choices[0].text.split(piece)[0]


def test_logprobs_in_both_styles(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 8, "seed": 2}
    chat = client.chat.completions.create(messages=TALE, logprobs=True, top_logprobs=2, **asked)  # type: ignore[call-overload]
    (choice,) = chat.choices
    content = choice.logprobs.content
    assert b"".join(bytes(item.bytes) for item in content).decode() == choice.message.content
    assert all(len(item.top_logprobs) == 2 and item.logprob <= 0 for item in content)
    streamed = []
    for chunk in client.chat.completions.create(messages=TALE, logprobs=True, top_logprobs=2, stream=True, **asked):  # type: ignore[call-overload]
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == content

    text = client.completions.create(prompt="Once upon a time", logprobs=3, echo=True, **asked)  # type: ignore[call-overload]
    (whole,) = text.choices
    assert whole.text.startswith("Once upon a time")
    logprobs = whole.logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == text.usage.total_tokens
    for token, offset, top in zip(
        logprobs.tokens[-8:], logprobs.text_offset[-8:], logprobs.top_logprobs[-8:], strict=True
    ):
        assert token in top
        assert len(top) in (3, 4)
        assert offset >= len("Once upon a time")
    pieces = client.completions.create(prompt="Once upon a time", logprobs=3, echo=True, stream=True, **asked)  # type: ignore[call-overload]
    found = [piece.choices[0] for piece in pieces]
    assert "".join(piece.text for piece in found) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for piece in found if piece.logprobs for value in getattr(piece.logprobs, name)]
        assert joined == getattr(logprobs, name)


ANIMAL = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "kind": {"enum": ["fox", "owl"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def test_json_schemas(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL, "strict": True}}
    asked = {"model": MODEL, "messages": TALE, "response_format": form, "max_tokens": 60, "n": 4, "seed": 3}
    answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    texts = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert texts
    for text in texts:
        animal = json.loads(text)
        assert set(animal) == {"name", "kind"}
        assert animal["kind"] in ("fox", "owl")
    streamed = [""] * 4
    for chunk in client.chat.completions.create(stream=True, **asked):  # type: ignore[call-overload]
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in answer.choices]
    cut = client.chat.completions.create(**asked | {"max_tokens": 2, "n": 1})  # type: ignore[call-overload]
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content[0]) == ("length", "{")
    wrong = form | {"json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked | {"response_format": wrong})  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == ("unsupported_grammar", "response_format")
    assert "uniqueItems" in caught.value.message
    (choice,) = client.completions.create(
        model=MODEL, prompt="It was a ", max_tokens=9, extra_body={"choice": ["fox", "owl"]}
    ).choices
    assert choice.text in ("fox", "owl")


def test_tools_that_must_be_called(client: openai.OpenAI) -> None:
    """The embedded model knows no tools: it is made to call them, as any model can be."""
    tools = [
        {"type": "function", "function": {"name": "draw", "parameters": ANIMAL}},
        {"type": "function", "function": {"name": "stop"}},
    ]
    asked = {"model": MODEL, "messages": TALE, "tools": tools, "max_tokens": 80, "seed": 1, "temperature": 0}
    named = {"type": "function", "function": {"name": "draw"}}
    (choice,) = client.chat.completions.create(tool_choice=named, **asked).choices  # type: ignore[call-overload]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "draw")
    assert set(json.loads(call.function.arguments)) == {"name", "kind"}
    name, arguments, reason, pieces = "", "", "", 0
    for chunk in client.chat.completions.create(tool_choice=named, stream=True, **asked):  # type: ignore[call-overload]
        for news in chunk.choices[0].delta.tool_calls or ():
            name += news.function.name or ""
            arguments += news.function.arguments
            pieces += 1
        reason = chunk.choices[0].finish_reason or reason
    assert (name, arguments, reason) == ("draw", call.function.arguments, "tool_calls")
    assert pieces > 3
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(tool_choice="auto", **asked)  # type: ignore[call-overload]
    assert caught.value.param == "tools"
    follow_up = [*TALE, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    with pytest.raises(openai.BadRequestError, match="The roles of stet-tales are") as caught:
        client.chat.completions.create(model=MODEL, messages=follow_up, max_tokens=3)
    assert caught.value.param == "messages"


def test_errors_have_their_classes(client: openai.OpenAI, server: RunningServer) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=MODEL, messages=TALE, temperature=3)  # type: ignore[call-overload]
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_request",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as long:
        create(model=MODEL, messages=TALE, max_tokens=10**6)  # type: ignore[call-overload]
    assert long.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-4", messages=TALE)  # type: ignore[call-overload]
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError) as unsupported:
        client.with_options(max_retries=3).completions.create(model=MODEL, prompt="x", best_of=3)
    assert (unsupported.value.status_code, unsupported.value.param) == (501, "best_of")
    assert time.monotonic() - began < 0.4, "it was tried again"
    closed = openai.OpenAI(base_url=f"http://127.0.0.1:{free()}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIConnectionError):
        closed.models.list()
    closed.close()


def free() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_closing_a_stream_frees_the_engine(client: openai.OpenAI, server: RunningServer) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=["x", "y"], max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        samples = metrics(server)
        if samples["stet_requests_running"] + samples["stet_requests_waiting"] == 0:
            break
        time.sleep(0.02)
    samples = metrics(server)
    assert samples["stet_requests_running"] + samples["stet_requests_waiting"] == 0
    assert samples['stet_requests_total{endpoint="/v1/completions",outcome="cancelled"}'] == 2
    assert samples['stet_kv_cache_blocks{state="used"}'] == 0

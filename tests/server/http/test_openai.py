"""The OpenAI-shaped routes over a scripted service: every chunk, every refusal, and what reaches the service."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.engine.request import FinishReason
from server.generation import (
    ChoiceFinished,
    Event,
    GenerationRequest,
    Problem,
    PromptLogprobs,
    Refusal,
    Started,
    TextDelta,
    Token,
    TokenLogprobs,
    ToolCallDelta,
)
from server.http.openai.schemas import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, parse_chat
from tests.server.http.scripted import ServerThread, completed, endless, never
from tests.server.http.wire import Connection, post, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": MESSAGES}, COMPLETIONS: {"prompt": "Once"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
}


async def two_choices(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("gen-1", "tiny", 7)
    yield TextDelta(1, "b", (6,))
    yield TextDelta(0, "", (5,))
    yield ChoiceFinished(1, FinishReason.STOP, "x")
    yield TextDelta(0, "a", (5,))
    yield ChoiceFinished(0, FinishReason.LENGTH)
    yield completed()


def chunks_of(answer: httpx.Response) -> list[Any]:
    """The data of every event; each must be one `data:` line."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *blocks, end = answer.text.split("\n\n")
    assert end == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block[6:]) if block != "data: [DONE]" else "[DONE]" for block in blocks]


def test_chat_answer(client: httpx.Client) -> None:
    body = client.post(CHAT, json=BODIES[CHAT]).json()
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "fp_0",
        "seed": 7,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a tale\n", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
    }


def test_completion_answer(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = two_choices
    body = client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | {"n": 2, "return_token_ids": True}).json()
    assert (body["id"], body["object"], body["usage"]) == ("cmpl-1", "text_completion", USAGE)
    common = {"logprobs": None}
    assert body["choices"] == [
        {"index": 0, "text": "a", "finish_reason": "length", "stop_reason": None, "token_ids": [5, 5], **common},
        {"index": 1, "text": "b", "finish_reason": "stop", "stop_reason": "x", "token_ids": [6], **common},
    ]


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_chunks(client: httpx.Client, server: ServerThread, include_usage: bool) -> None:
    server.service.script = two_choices
    sent = BODIES[CHAT] | {"stream": True, "n": 2, "stream_options": {"include_usage": include_usage}}
    *chunks, last = chunks_of(client.post(CHAT, json=sent))
    assert last == "[DONE]"
    created = chunks[0]["created"]
    if include_usage:
        total = chunks.pop()
        assert (total["choices"], total["usage"], total["seed"]) == ([], USAGE, 7)
    for chunk in chunks:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": created, "model": "tiny"}
        assert head.items() <= chunk.items()
        assert chunk["system_fingerprint"] == "fp_0"
        assert ("usage" in chunk) == include_usage
        assert chunk.get("usage") is None
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        [{"index": 1, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        [{"index": 1, "delta": {"content": "b"}, "logprobs": None, "finish_reason": None}],
        [{"index": 1, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": "x"}],
        [{"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    ]


def test_completion_chunks(client: httpx.Client) -> None:
    sent = BODIES[COMPLETIONS] | {"stream": True, "return_token_ids": True, "request_id": "mine"}
    *chunks, last = chunks_of(client.post(COMPLETIONS, json=sent))
    assert last == "[DONE]"
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {("mine", "text_completion")}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "token_ids": [5]}],
        [{"index": 0, "text": " tale\n", "logprobs": None, "finish_reason": None, "token_ids": [6]}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    ]


def test_a_failure_in_a_stream_is_an_error_chunk_without_done(client: httpx.Client, server: ServerThread) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Started("gen-1", "tiny", 7)
        yield TextDelta(0, "a", (5,))
        yield ChoiceFinished(0, FinishReason.ERROR, error="The engine went down twice.")
        yield completed()

    server.service.script = script
    for path, body in BODIES.items():
        *_, last = chunks_of(client.post(path, json=body | {"stream": True}))
        assert last["error"]["message"] == "The engine went down twice."
        assert client.post(path, json=body).status_code == 500


def test_what_the_service_is_asked(client: httpx.Client, server: ServerThread) -> None:
    sent = {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": None,
                "refusal": None,
                "audio": None,
                "annotations": [],
            },
            {"role": "user", "content": "Hi", "name": "Ann"},
        ],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": -1},
        "seed": 3,
        "stop": "x",
        "n": 2,
        "user": "someone",
        "top_k": 4,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_new_tokens": 1,
        "cache_salt": "s",
    }
    assert client.post(CHAT, json=sent).status_code == 200
    assert server.service.seen == [
        GenerationRequest(
            messages=(
                {"role": "developer", "content": sent["messages"][0]["content"]},  # type: ignore[index]
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "Hi", "name": "Ann"},
            ),
            max_new_tokens=5,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=1.0,
            frequency_penalty=-1.0,
            logit_bias={5: -1.0},
            seed=3,
            stop=("x",),
            n=2,
            top_k=4,
            min_p=0.1,
            typical_p=0.8,
            repetition_penalty=1.1,
            ignore_eos=True,
            min_new_tokens=1,
            cache_salt="s",
            chat=True,
        )
    ]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ORDER = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ({"tools": [TOOL]}, {"tools": (TOOL,)}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tools": (TOOL,), "tool_choice": "required"}),
        ({"tools": [TOOL], "tool_choice": ORDER}, {"tools": (TOOL,), "tool_choice": "function:f"}),
        ({"tools": [TOOL], "tool_choice": "none"}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tools": [TOOL], "parallel_tool_calls": False}, {"tools": (TOOL,), "parallel_tool_calls": False}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"grammar": ("json_schema", {"type": "object"})}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"a": 1}},
                }
            },
            {"grammar": ("json_schema", {"a": 1})},
        ),
        ({"regex": "x"}, {"grammar": ("regex", "x")}),
    ],
    ids=str,
)
def test_tools_formats_and_logprobs(
    client: httpx.Client, server: ServerThread, sent: dict[str, Any], asked: dict[str, Any]
) -> None:
    assert client.post(CHAT, json=BODIES[CHAT] | sent).status_code == 200
    (request,) = server.service.seen
    plain = GenerationRequest(messages=request.messages, chat=True)
    assert request == dataclasses.replace(plain, **asked)


def scored(token_id: int, data: bytes, special: bool = False) -> TokenLogprobs:
    return TokenLogprobs(Token(token_id, data.decode("utf-8", "replace"), data, special), -1.0, ())


async def echoing(request: GenerationRequest) -> AsyncIterator[Event]:
    """Echoes "A fé" behind a token of its own, then says " ¿x" around another, and last what it had held back."""
    begin = Token(1, "<s>", b"<s>", True)
    yield Started("gen-1", "tiny", 7)
    yield PromptLogprobs(0, begin, (None, *(scored(5, piece) for piece in (b"A", b" f", b"\xc3", b"\xa9"))))
    yield TextDelta(0, "A fé", ())
    yield TextDelta(0, " ", (6,), (scored(6, b" \xc2"),))
    yield TextDelta(0, "¿", (7, 1), (scored(7, b"\xbf"), scored(1, b"<s>", True)))
    yield TextDelta(0, "", (8,), (scored(8, b"x"),))
    yield TextDelta(0, "x", ())
    yield ChoiceFinished(0, FinishReason.DEADLINE)
    yield completed()


def test_offsets_are_of_the_text_and_the_prompt_comes_once(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = echoing
    asked = BODIES[COMPLETIONS] | {"echo": True, "logprobs": 0}
    (choice,) = client.post(COMPLETIONS, json=asked).json()["choices"]
    assert choice["text"] == "A fé ¿x"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 3, 3, 4, 5, 6, 6]
    *chunks, _ = chunks_of(client.post(COMPLETIONS, json=asked | {"stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, whole in choice["logprobs"].items():
        assert [item for part in parts if part is not None for item in part[name]] == whole


async def calling(request: GenerationRequest) -> AsyncIterator[Event]:
    """Thinks, speaks and calls twice, in pieces."""
    yield Started("gen-1", "tiny", 7)
    yield TextDelta(0, "", (4,), reasoning="Hm")
    yield TextDelta(0, "", (4,), reasoning=".")
    yield TextDelta(0, "So: ", (5,))
    yield TextDelta(0, "", (6,), calls=(ToolCallDelta(0, "call_a", "f", ""), ToolCallDelta(0, None, None, '{"x"')))
    yield TextDelta(0, "", (7,), calls=(ToolCallDelta(0, None, None, ": 1}"), ToolCallDelta(1, "call_b", "g", "")))
    yield TextDelta(0, "", (7,), calls=(ToolCallDelta(1, None, None, "{}"),))
    yield ChoiceFinished(0, FinishReason.STOP, 2, called=True)
    yield completed()


def test_calls_and_reasoning_in_an_answer_and_in_chunks(client: httpx.Client, server: ServerThread) -> None:
    server.service.script = calling
    (choice,) = client.post(CHAT, json=BODIES[CHAT]).json()["choices"]
    expected = [
        {"function": {"arguments": '{"x": 1}', "name": "f"}, "id": "call_a", "type": "function"},
        {"function": {"arguments": "{}", "name": "g"}, "id": "call_b", "type": "function"},
    ]
    assert choice["message"] == {
        "role": "assistant",
        "content": "So: ",
        "refusal": None,
        "reasoning_content": "Hm.",
        "tool_calls": expected,
    }
    assert choice["finish_reason"] == "tool_calls"
    *chunks, done = chunks_of(client.post(CHAT, json=BODIES[CHAT] | {"stream": True}))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "So: "
    news = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in news] == [0, 0, 0, 1, 1]
    assert [(call["id"], call["function"]["name"], call["type"]) for call in news if "id" in call] == [
        ("call_a", "f", "function"),
        ("call_b", "g", "function"),
    ]
    assert "".join(call["function"]["arguments"] for call in news) == '{"x": 1}{}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_may_be_sent_back_with_their_results(client: httpx.Client, server: ServerThread) -> None:
    call = {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "function_call": None},
        {"role": "tool", "content": "3", "tool_call_id": "call_a"},
    ]
    assert client.post(CHAT, json={"messages": messages}).status_code == 200
    (request,) = server.service.seen
    assert request.messages is not None
    assert request.messages[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "call_a"},
    )


@pytest.mark.parametrize(
    ("prompt", "requests"),
    [
        ("a", [{"prompt": "a"}]),
        ([1, 2], [{"prompt_token_ids": (1, 2)}]),
        (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
        ([[1], [2, 3]], [{"prompt_token_ids": (1,)}, {"prompt_token_ids": (2, 3)}]),
    ],
    ids=str,
)
def test_prompts(client: httpx.Client, server: ServerThread, prompt: Any, requests: list[dict[str, Any]]) -> None:
    assert client.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 9}).status_code == 200
    expected = [GenerationRequest(max_new_tokens=9, **given) for given in requests]
    assert sorted(server.service.seen, key=str) == sorted(expected, key=str)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "contant": "x"}]}, "messages[0].contant"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": True}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    (CHAT, {"max_tokens": 5, "min_new_tokens": 6}, "min_new_tokens"),
    (CHAT, {"temperature": 3}, "temperature"),
    (CHAT, {"n": 9}, "n"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"seed": -1}, "seed"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias[x]"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (CHAT, {"max_new_tokens": 5}, "max_new_tokens"),
    (CHAT, {"do_sample": False}, "do_sample"),
    (CHAT, {"user": 5}, "user"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": "f"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    (CHAT, {"parallel_tool_calls": 1}, "parallel_tool_calls"),
    (CHAT, {"response_format": "json"}, "response_format"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_object"}, "regex": "x"}, "response_format"),
    (CHAT, {"regex": "x", "choice": ["y"]}, "choice"),
    (CHAT, {"stream": True, "dry_run": True}, "dry_run"),
    (COMPLETIONS, {"prompt": ["x", "y"], "dry_run": True}, "dry_run"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (CHAT, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    (CHAT, {"stream": True, "stream_options": True}, "stream_options"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"index": 0}]}]},
        "messages[0].tool_calls[0].index",
    ),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    (CHAT, {"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 65}, "prompt"),
    (COMPLETIONS, {"prompt": ["x", 5]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [5, "x"]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [5, True]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [-5]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [True]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [[5], []]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [[5], [6, 2**31]]}, "prompt[1][1]"),
    (COMPLETIONS, {"prompt": [[5], "x"]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": ["x", "y"], "logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
    (COMPLETIONS, {"messages": MESSAGES}, "messages"),
    (COMPLETIONS, {"max_completion_tokens": 5}, "max_completion_tokens"),
]


def test_messages_that_are_refused_are_not_told_to_be_missing_as_well() -> None:
    parsed = parse_chat({"messages": [{"role": "user", "content": None}]})
    assert parsed.requests[0].messages is None
    assert [problem.param for problem in parsed.problems] == ["messages[0].content"]


@pytest.mark.parametrize(("path", "sent", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(client: httpx.Client, server: ServerThread, path: str, sent: dict[str, Any], param: str) -> None:
    answer = client.post(path, json=BODIES[path] | sent)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "details"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_request", param)
    assert param in error["message"]
    assert len(error["details"]) == 1
    assert server.service.seen == []


def test_a_native_name_is_answered_with_the_one_of_this_route(client: httpx.Client) -> None:
    error = client.post(COMPLETIONS, json={"prompt": "x", "max_new_tokens": 5}).json()["error"]
    assert error["message"].endswith("Did you mean max_tokens?")


IDLE = {CHAT: CHAT_UNSUPPORTED, COMPLETIONS: COMPLETION_UNSUPPORTED}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in IDLE.items() for name in names])
def test_not_supported_yet(client: httpx.Client, path: str, name: str) -> None:
    for idle in (IDLE[path][name], None):
        assert client.post(path, json=BODIES[path] | {name: idle}).status_code == 200
    answer = client.post(path, json=BODIES[path] | {name: [{"type": "x"}]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (501, "unsupported", name)
    assert answer.headers["x-should-retry"] == "false"


def test_members_of_messages_that_are_not_supported_yet(client: httpx.Client) -> None:
    message = {"role": "assistant", "content": "x", "function_call": {"name": "f"}}
    answer = client.post(CHAT, json={"messages": [*MESSAGES, message]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (501, "messages[1].function_call")


def test_another_model_is_not_found(client: httpx.Client, server: ServerThread) -> None:
    for path, body in BODIES.items():
        error = client.post(path, json=body | {"model": "gpt-4"})
        assert (error.status_code, error.json()["error"]["code"]) == (404, "model_not_found")
        assert error.json()["error"]["param"] == "model"
        unsupported = "best_of" if path == COMPLETIONS else "store"
        both = client.post(path, json=body | {"model": "gpt-4", "temperature": 3, unsupported: 3})
        assert both.status_code == 400
        assert {item["param"] for item in both.json()["error"]["details"]} == {"model", "temperature", unsupported}
    assert server.service.seen == []


def test_problems_of_the_service_are_told_in_the_words_that_were_sent(
    client: httpx.Client, server: ServerThread
) -> None:
    server.service.found = [
        Problem("max_new_tokens", "max_new_tokens is too much.", 9, "1 to 8"),
        Problem("prompt_token_ids", "prompt_token_ids must be ids.", 9),
    ]

    def params(path: str, sent: dict[str, Any]) -> list[str]:
        answer = client.post(path, json=sent)
        assert answer.status_code == 400
        assert "max_new_tokens" not in answer.text
        return [item["param"] for item in answer.json()["error"]["details"]]

    assert params(CHAT, BODIES[CHAT] | {"max_tokens": 9})[0] == "max_tokens"
    assert params(CHAT, BODIES[CHAT] | {"max_completion_tokens": 9})[0] == "max_completion_tokens"
    assert params(COMPLETIONS, {"prompt": [9]}) == ["max_tokens", "prompt"]
    assert params(COMPLETIONS, {"prompt": [[9], [9]]}) == ["max_tokens", "prompt[0]", "prompt[1]"]

    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        raise Refusal("context_length_exceeded", [Problem("max_new_tokens", "max_new_tokens 9 exceeds it.", 9)])
        yield completed()

    server.service.found, server.service.script = [], script
    for stream in (False, True):
        error = client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 9, "stream": stream}).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
        assert error["message"] == "max_tokens 9 exceeds it."


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_closes_the_generator(server: ServerThread, path: str, stream: bool) -> None:
    for script in (never, endless):
        server.service.script = script
        with Connection(server.port) as connection:
            connection.send(post(BODIES[path] | {"stream": stream}, path))
            if script is endless and stream:
                connection.read_until(b"word")
            wait_for(lambda: server.service.num_open == 1)
        wait_for(lambda: server.service.num_open == 0)


def test_refusals_are_counted_by_route(client: httpx.Client, server: ServerThread) -> None:
    line = f'stet_requests_total{{endpoint="{CHAT}",outcome="invalid_request"}} '

    def count() -> float:
        text = server.metrics.render(None)[0].decode()
        return float(text.split(line)[1].split()[0]) if line in text else 0.0

    before = count()
    client.post(CHAT, json={})
    assert count() == before + 1


def test_models(client: httpx.Client, server: ServerThread) -> None:
    body = client.get("/v1/models").json()
    (model,) = body["data"]
    assert body["object"] == "list"
    assert model.items() >= {"id": "tiny", "object": "model", "owned_by": "stet", "max_model_len": 100}.items()
    assert client.get("/v1/models/tiny").json() == model
    for name in ("other", "a/b", "%2e%2e", "<b>"):
        answer = client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "<b>" not in answer.text
    assert 'route="/v1/models",status="404"' in server.metrics.render(None)[0].decode()


def test_tokenize_and_detokenize(client: httpx.Client, server: ServerThread) -> None:
    answer = client.post("/tokenize", json={"prompt": "x", "add_special_tokens": False, "model": "tiny"})
    assert answer.json() == {"count": 2, "max_model_len": 100, "tokens": [5, 6]}
    assert client.post("/tokenize", json={"messages": MESSAGES}).status_code == 200
    assert server.service.seen == [
        GenerationRequest(prompt="x", add_special_tokens=False),
        GenerationRequest(messages=({"role": "user", "content": "Hi"},)),
    ]
    assert client.post("/detokenize", json={"tokens": [5, 6]}).json() == {"prompt": "[5, 6] False"}
    answer = client.post("/detokenize", json={"tokens": [5] * 3000, "skip_special_tokens": True})
    assert answer.json()["prompt"].endswith("True")


@pytest.mark.parametrize(
    ("path", "sent", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "promt": 5}, "promt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [5, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": [5], "skip_special_tokens": 1}, "skip_special_tokens"),
    ],
    ids=str,
)
def test_tokens_refused(client: httpx.Client, path: str, sent: dict[str, Any], param: str) -> None:
    answer = client.post(path, json=sent)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text

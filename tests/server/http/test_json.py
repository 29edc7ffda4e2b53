"""JSON that is exactly JSON: everything else is 400, never 500, whatever is sent."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.http.errors import HttpError, clip
from server.http.limits import MAX_DEPTH, parse_json_object
from server.http.schemas import parse_generate
from tests.server.http.scripted import ServerThread

BAD = {
    "empty": b"",
    "blank": b"  \n",
    "no json": b"hello",
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "number": b"1",
    "trailing comma": b'{"prompt":"x",}',
    "single quotes": b"{'prompt':'x'}",
    "comment": b'{"prompt":"x"} // y',
    "two values": b'{"prompt":"x"}{"prompt":"x"}',
    "unquoted key": b'{prompt:"x"}',
    "control character": b'{"prompt":"a\nb"}',
    "open string": b'{"prompt":"x',
    "open object": b'{"prompt":"x"',
    "bad escape": b'{"prompt":"\\x"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt":"x"}',
    "latin-1": '{"prompt":"é"}'.encode("latin-1"),
    "utf-16": '{"prompt":"x"}'.encode("utf-16"),
    "encoded surrogate": b'{"prompt":"\xed\xa0\x80"}',
    "overlong": b'{"prompt":"\xc0\xaf"}',
    "NaN": b'{"prompt":"x","temperature":NaN}',
    "Infinity": b'{"prompt":"x","temperature":Infinity}',
    "-Infinity": b'{"prompt":"x","temperature":-Infinity}',
    "1e999": b'{"prompt":"x","temperature":1e999}',
    "-1e999": b'{"prompt":"x","presence_penalty":-1e999}',
    "1e999 in a place that takes anything": b'{"prompt":"x","logit_bias":{"1":1e999}}',
    "huge integer": b'{"prompt":"x","seed":' + b"9" * 10_000 + b"}",
    "large integer": b'{"prompt":"x","seed":' + b"9" * 300 + b"}",
    "large integer for a number": b'{"prompt":"x","temperature":' + b"9" * 390 + b"}",
    "many digits": b'{"prompt":"x","temperature":0.' + b"9" * 5000 + b"e999}",
    "hexadecimal": b'{"prompt":"x","seed":0x10}',
    "leading zero": b'{"prompt":"x","seed":01}',
    "plus": b'{"prompt":"x","seed":+1}',
    "duplicate key": b'{"prompt":"x","seed":1,"seed":1}',
    "duplicate key by escape": b'{"prompt":"x","seed":1,"\\u0073eed":1}',
    "duplicate nested key": b'{"messages":[{"role":"user","content":"x","content":"y"}]}',
    "duplicate bias": b'{"prompt":"x","logit_bias":{"1":1,"1":2}}',
    "lone surrogate": b'{"prompt":"\\ud800"}',
    "lone low surrogate": b'{"prompt":"\\udc00 x"}',
    "reversed surrogates": b'{"prompt":"\\udc00\\ud800"}',
    "lone surrogate in a list": b'{"prompt":"x","stop":["\\uD83D"]}',
    "lone surrogate in a key": b'{"prompt":"x","\\ud800":1}',
    "lone surrogate in a message": b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    "deep arrays": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and broken": b"[" * 500_000,
    "true for an integer": b'{"prompt":"x","seed":true}',
    "true for a number": b'{"prompt":"x","temperature":true}',
    "5.0 for an integer": b'{"prompt":"x","max_new_tokens":5.0}',
    "1e2 for an integer": b'{"prompt":"x","max_new_tokens":1e2}',
    "text for a number": b'{"prompt":"x","temperature":"1"}',
    "1 for a bool": b'{"prompt":"x","stream":1}',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_400(client: httpx.Client, server: ServerThread, name: str) -> None:
    answer = client.post("/generate", content=BAD[name], headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["message"]
    assert len(answer.content) < 2000
    assert server.service.seen == []


GOOD = {
    "surrogate pair": ('{"prompt":"\\ud83d\\ude00"}', "😀"),
    "escaped backslash before u": ('{"prompt":"\\\\ud800"}', "\\ud800"),
    "null character": ('{"prompt":"\\u0000"}', "\0"),
    "brackets in text": ('{"prompt":"' + "[{" * 1000 + '"}', "[{" * 1000),
    "quotes in text": ('{"prompt":"' + '\\"' * 1000 + '"}', '"' * 1000),
    "white space": (' \n\t{ "prompt" : "x" } \r\n', "x"),
    "emoji": ('{"prompt":"🦊"}', "🦊"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_bodies(client: httpx.Client, server: ServerThread, name: str) -> None:
    body, prompt = GOOD[name]
    answer = client.post("/generate", content=body.encode(), headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert server.service.seen[0].prompt == prompt


def test_problems_say_where() -> None:
    def problem(body: str) -> str | None:
        with pytest.raises(HttpError) as caught:
            parse_json_object(body.encode())
        return caught.value.problems[0].param

    assert problem('{"a":[{"b":"\\ud800"}]}') == "a[0].b"
    assert problem('{"a":1,"a":2}') == "a"
    assert problem('{"a":{"b":1,"b":2}}') is None
    assert problem('{"a":{"b":1,"b":2},"c":1,"c":2}') == "c"
    assert problem('{"a":1,"a' + "x" * 100 + '":NaN}') is None


@pytest.mark.parametrize(("stop", "place"), [("", "stop"), ([""], "stop[0]"), (["a", ""], "stop[1]"), (5, "stop")])
def test_a_stop_string_is_named_as_it_was_sent(stop: Any, place: str) -> None:
    (problem,) = parse_generate({"prompt": "x", "stop": stop}).problems
    assert problem.param == place


def test_depth() -> None:
    parse_json_object(b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")
    with pytest.raises(HttpError, match="nested deeper"):
        parse_json_object(b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")


@pytest.mark.parametrize(
    "body",
    [
        b'{"' + b'\\"' * 500_000,
        b'"\\' * 300_000,
        b'{"a":' + b'"",' * 300_000,
        b"[" + b"{}," * 300_000,
        b'{"prompt_token_ids":[' + b'"x",' * 200_000 + b'"x"]}',
        b'{"messages":[' + b'{"x":1},' * 120_000 + b'{"x":1}]}',
        b"{" + b",".join(b'"k%d":1' % number for number in range(80_000)) + b"}",
        b'{"logit_bias":{' + b",".join(b'"k%d":1' % number for number in range(80_000)) + b"}}",
        b'{"' + b"temperature" * 90_000 + b'":1}',
        b'{"prompt":"x","stop":[' + b'"",' * 200_000 + b'""]}',
        b'{"prompt":"x","seed":' + b"1" * 1_000_000 + b"}",
        b'{"prompt":"x","temperature":' + b"1" * 1_000_000 + b".5}",
    ],
)
def test_no_body_is_slow(body: bytes) -> None:
    assert len(body) <= 2**20 + 2**17
    began = time.process_time()
    try:
        problems = parse_generate(parse_json_object(body)).problems
    except HttpError as error:
        problems = error.problems
    assert problems
    assert len(problems) <= 32
    assert time.process_time() - began < 1.5


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=10,
)


@given(_json_values)
@settings(max_examples=200, deadline=None)
def test_reads_what_json_reads(value: Any) -> None:
    body = json.dumps({"value": value}).encode()
    assert parse_json_object(body) == json.loads(body)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(HttpError):
        parse_json_object(body)


_names = st.sampled_from(
    ["prompt", "messages", "stop", "seed", "top_p", "logit_bias", "n", "stream", "request_id", "x"]
)


@given(st.dictionaries(_names, _json_values, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_object_is_checked(body: dict[str, Any]) -> None:
    parsed = parse_generate(body)
    for problem in parsed.problems + parsed.unsupported:
        json.dumps(clip(problem.value))
        assert problem.message

"""Every row of the table of parameters: its lowest and highest value, just outside, and of a wrong type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from server.http.schemas import GenerateBody
from tests.conformance.conftest import CONTEXT
from tests.server.http.launch import VOCABULARY, Launched

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
LAST = VOCABULARY - 1
TEXTS: list[Any] = [1, True, ["x"], {"x": 1}]
NUMBERS: list[Any] = [True, False, "1", [1], {}]
INTEGERS: list[Any] = [*NUMBERS, 1.0, 1.5, 10**30]
BOOLS: list[Any] = [0, 1, "true", [], {}]

# parameter -> (values that are accepted, values that are refused)
TABLE: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["x", "é 🦊 \u0000 \u202e", " ", "x" * 400], TEXTS),
    "prompt_token_ids": (
        [[0], [LAST], [5] * (CONTEXT - 5)],
        [[], [-1], [VOCABULARY], [2**31], [2**70], [1.0], [True], ["1"], [[1]], [None], 1, "1", {}],
    ),
    "messages": (
        [
            [{"role": "user", "content": "x"}],
            [
                {"role": "system", "content": ""},
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y"},
            ],
        ],
        [
            [],
            ["x"],
            [{}],
            [{"role": "user"}],
            [{"content": "x"}],
            [{"role": "robot", "content": "x"}],
            [{"role": "user", "content": 1}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": ["x"]}],
            [{"role": "user", "content": "x", "name": "y"}],
            {"role": "user", "content": "x"},
            "x",
        ],
    ),
    "max_new_tokens": ([1, 4, 400], [0, -1, CONTEXT, 2**31, *INTEGERS]),
    "min_new_tokens": ([0, 1, 4], [-1, 5, *INTEGERS]),
    "temperature": ([0, 0.0, -0.0, 1e-300, 0.5, 2, 2.0], [-0.001, 2.001, 10**300, *NUMBERS]),
    "do_sample": ([True, False], BOOLS),
    "top_k": ([-1, 0, 1, VOCABULARY], [-2, VOCABULARY + 1, *INTEGERS]),
    "top_p": ([1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.001, *NUMBERS]),
    "typical_p": ([1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.001, *NUMBERS]),
    "min_p": ([0, 0.5, 1], [-0.001, 1.001, *NUMBERS]),
    "repetition_penalty": ([1e-37, 1, 10, 10.0], [0, -1, 1e-39, 10.001, *NUMBERS]),
    "presence_penalty": ([-2, 0, 2, 2.0], [-2.001, 2.001, *NUMBERS]),
    "frequency_penalty": ([-2, 0, 2, 2.0], [-2.001, 2.001, *NUMBERS]),
    "logit_bias": (
        [{}, {"0": -100, str(LAST): 100, "7": 0.5}],
        [
            {str(VOCABULARY): 1},
            {"-1": 1},
            {"x": 1},
            {"01": 1},
            {"1.0": 1},
            {" 1": 1},
            {"1": 100.001},
            {"1": -100.001},
            {"1": True},
            {"1": "1"},
            {"1": None},
            [],
            "x",
            1,
        ],
    ),
    "seed": ([0, 7, 2**53 - 1, 2**63 - 1], [-1, 2**63, *INTEGERS]),
    "n": ([1, 2, 8], [0, -1, 9, *INTEGERS]),
    "stop": (
        ["x", [], ["x"], "y" * 256, [str(number) for number in range(16)]],
        ["", [""], ["x", 1], ["x"] * 17, "y" * 257, ["x", "y" * 257], 1, True, {}],
    ),
    "include_stop": ([True, False], BOOLS),
    "stop_token_ids": (
        [[], [0], [LAST] * 64],
        [[VOCABULARY], [-1], [1] * 65, [1.0], [True], ["1"], 1, "1", {}],
    ),
    "ignore_eos": ([True, False], BOOLS),
    "logprobs": ([0, 20], [-1, 21, *INTEGERS]),
    "prompt_logprobs": ([0, 20], [-1, 21, *INTEGERS]),
    "allowed_token_ids": (
        [[0], [LAST] * 64],
        [[], [VOCABULARY], [-1], [1.0], [True], ["1"], 1, "1", {}],
    ),
    "bad_words": ([[], ["x"], ["é 🦊", " ", "x" * 256] * 21], ["", [""], ["x" * 257], ["x"] * 65, [1], 1, True, {}]),
    "explain": ([1, 20], [0, -1, 21, *INTEGERS]),
    "json_schema": (
        [{}, {"type": "object", "properties": {"a": {"type": "integer"}}}],
        [[], {"type": "nothing"}, {"$ref": "#/x"}, "{}", 1, True],
    ),
    "regex": (["x", "[0-9]{2,4}"], ["", "(", "x" * 65_537, 1, True, []]),
    "grammar": (['start: "x"'], ["", "((", "start: nowhere", 1, True, []]),
    "choice": ([["a", "b"], ["é 🦊"]], [[], [""], ["a", 1], ["x"] * 1025, "a", 1, {}]),
    "stream": ([True, False], BOOLS),
    "echo": ([True, False], BOOLS),
    "return_token_ids": ([True, False], BOOLS),
    "skip_special_tokens": ([True, False], BOOLS),
    "add_special_tokens": ([True, False], BOOLS),
    "truncate_prompt_tokens": ([1, 2**31 - 1], [0, -1, 2**31, *INTEGERS]),
    "priority": ([-100, 0], [-101, 1, 100, 101, *INTEGERS]),
    "request_id": (
        ["x", "é-🦊", "x" * 128],
        ["", "x" * 129, "a\nb", "a\u0000", "\u202e", "\u2028", "\x7f", 1, True, []],
    ),
    "cache_salt": (["", "x" * 256, "a\nb"], ["x" * 257, 1, True, []]),
    "deadline_ms": ([3_600_000, 20_000], [99, 0, -1, 3_600_001, *INTEGERS]),
    "dry_run": ([True, False], BOOLS),
}
PROMPTS = ("prompt", "prompt_token_ids", "messages")


def body(name: str, value: Any) -> dict[str, Any]:
    sent: dict[str, Any] = {} if name in PROMPTS else {"prompt": "x"}
    if name != "max_new_tokens":
        sent["max_new_tokens"] = 4
    return sent | {name: value}


def cases(index: int) -> list[tuple[str, Any]]:
    return [(name, value) for name, row in TABLE.items() for value in row[index]]


def label(value: Any) -> str:
    return str(value)[:24].encode("ascii", "replace").decode()


@pytest.mark.parametrize(("name", "value"), cases(0), ids=label)
def test_accepted(server: Launched, name: str, value: Any) -> None:
    answer = server.generate(**body(name, value))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("name", "value"), cases(1), ids=label)
def test_refused(server: Launched, name: str, value: Any) -> None:
    answer = server.generate(**body(name, value))
    needs_admin = name == "priority" and type(value) is int and 0 < value <= 100
    assert answer.status_code == (403 if needs_admin else 400), answer.text
    error = answer.json()["error"]
    assert error["code"] == ("forbidden" if needs_admin else "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(name)
    assert error["details"][0]["param"] == error["param"]
    for detail in error["details"]:
        assert re.split(r"[.\[]", detail["param"])[0] == name
        assert detail["allowed"]


@pytest.mark.parametrize("name", TABLE)
def test_null_is_left_out(server: Launched, name: str) -> None:
    answer = server.generate(
        **(body(name, None) | ({"prompt": "x"} if name != "prompt" else {"prompt_token_ids": [5]}))
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ("regex", "a(?=b)", "look-around"),
    ],
)
def test_grammars_that_are_not_supported_are_named(server: Launched, name: str, value: Any, said: str) -> None:
    answer = server.generate(**body(name, value))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_grammar", name)
    assert said in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", ["x"]), ("stop_token_ids", [5]), ("ignore_eos", True), ("allowed_token_ids", [5]), ("choice", ["x"])],
)
def test_what_contradicts_a_grammar_is_refused(server: Launched, name: str, value: Any) -> None:
    answer = server.generate(prompt="x", regex="x", **{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_exactly_one_prompt(server: Launched) -> None:
    for sent in (
        {},
        {"prompt": None},
        {"prompt": "x", "prompt_token_ids": [5]},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"prompt_token_ids": [5], "messages": [{"role": "user", "content": "x"}]},
        {"prompt": "x", "prompt_token_ids": [5], "messages": [{"role": "user", "content": "x"}]},
    ):
        answer = server.generate(**sent)
        assert answer.status_code == 400
        assert "ne of prompt, prompt_token_ids and messages" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("topp", "top_p"), ("qqq", None), ("", None)],
)
def test_unknown_parameters(server: Launched, name: str, nearest: str | None) -> None:
    answer = server.generate(**{"prompt": "x", name: 1})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == name
    if nearest:
        assert error["message"].endswith(f"Did you mean {nearest}?")


def test_contradictions(server: Launched) -> None:
    for sent in ({"do_sample": False, "temperature": 0.5}, {"do_sample": True, "temperature": 0}):
        answer = server.generate(prompt="x", **sent)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "do_sample"
    for sent in ({"do_sample": False, "temperature": 0}, {"do_sample": True, "temperature": 0.5}):
        assert server.generate(prompt="x", max_new_tokens=2, **sent).status_code == 200


def test_many_problems_in_one_answer(server: Launched) -> None:
    wrong = {name: row[1][0] for name, row in TABLE.items() if name not in PROMPTS}
    answer = server.generate(prompt="x", **wrong)
    details = answer.json()["error"]["details"]
    assert {re.split(r"[.\[]", item["param"])[0] for item in details} == set(wrong)


def test_values_are_clipped(server: Launched) -> None:
    answer = server.generate(prompt="x", temperature="y" * 100_000, stop={"k": ["z"] * 1000}, request_id=["w"] * 5000)
    assert answer.status_code == 400
    assert len(answer.content) < 1500


def test_a_prompt_that_does_not_fit_says_the_numbers(server: Launched) -> None:
    ids = [5] * (CONTEXT - 5)
    assert server.generate(prompt_token_ids=ids, max_new_tokens=5).status_code == 200
    for sent in (
        {"prompt_token_ids": ids, "max_new_tokens": 6},
        {"prompt_token_ids": [5] * CONTEXT},
        {"prompt_token_ids": [5] * (CONTEXT * 4)},
        {"prompt": "x" * 5000},
        {"messages": [{"role": "user", "content": "x" * 5000}]},
    ):
        answer = server.generate(**sent)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded"), answer.text
        assert str(CONTEXT) in error["message"]
        assert re.findall(r"\d+", error["message"])


def test_max_new_tokens_defaults_to_the_room(server: Launched) -> None:
    answer = server.generate(prompt_token_ids=[5] * (CONTEXT - 7), ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 7
    answer = server.generate(prompt_token_ids=[5], ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 256


# The page and the code


def test_this_file_knows_every_parameter() -> None:
    assert set(TABLE) == set(GenerateBody.model_fields)


def test_the_page_says_what_the_code_does() -> None:
    text = PAGE.read_text()
    for name, field in GenerateBody.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        note = f"; {extra['note']}" if extra["note"] else ""
        assert f"\n| `{name}` | {extra['allowed']}{note} | {extra['shown']} |\n" in text
    section = text[text.index("## `POST /generate`") : text.index("### Answer")]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert rows == list(GenerateBody.model_fields)

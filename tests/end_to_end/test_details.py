"""What /generate says of its tokens, on a real server: log-probabilities, explanations, deadlines, dry runs."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from loadtests.processes import RunningServer
from tests.end_to_end.client import Answer, post

ASK: dict[str, Any] = {"prompt": "Once upon a time, a fox", "max_new_tokens": 12, "seed": 5, "temperature": 0.9}


def ask(server: RunningServer, **request: Any) -> Answer:
    return asyncio.run(post(server, ASK | request))


def philox_31(seed: int, position: int, choice: int) -> int:
    """The random number of a draw, from its paper (Salmon et al., 2011): no code of ours."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3, k0, k1 = position, choice, 0, 0, seed & low, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0 >> 1


def test_a_reader_reproduces_each_choice_from_the_json(server: RunningServer) -> None:
    request = {"top_k": 12, "top_p": 0.95, "explain": 20, "return_token_ids": True, "n": 2, "repetition_penalty": 1.1}
    answer = ask(server, **request)
    assert answer.status == 200
    for output in answer.body["outputs"]:
        assert len(output["explain"]) == len(output["token_ids"])
        for place, (token_id, draw) in enumerate(zip(output["token_ids"], output["explain"], strict=True)):
            r, total, candidates = draw["r"], draw["K"], draw["candidates"]
            assert r == philox_31(answer.body["seed"], place, output["index"])
            starts, ends = np.array([c["interval"] for c in candidates]).T
            target = r * total >> 31
            (chosen,) = np.flatnonzero((starts <= target) & (target < ends))
            assert candidates[chosen]["id"] == draw["id"] == token_id
            # top_k 12 keeps no more, so all that could be drawn is here, and the intervals fill 0 to K.
            order = np.argsort([c["id"] for c in candidates], kind="stable")
            weights = (ends - starts)[order]
            assert weights.sum() == total
            assert candidates[order[np.searchsorted(np.cumsum(weights), target, side="right")]]["id"] == token_id
            for candidate in candidates:
                weight = candidate["interval"][1] - candidate["interval"][0]
                assert candidate["final_probability"] == weight / total
                assert (candidate["removed_by"] in ("top_k", "top_p", "weight")) == (weight == 0)


def test_json_and_stream_say_the_same(server: RunningServer) -> None:
    request = {"logprobs": 2, "prompt_logprobs": 1, "echo": True, "explain": 1, "return_token_ids": True}
    whole = ask(server, **request)
    stream = ask(server, **request, stream=True)
    (output,) = whole.body["outputs"]
    assert output["text"].startswith(ASK["prompt"])
    assert stream.text == output["text"]
    assert [event["prompt_logprobs"] for event in stream.events[:1]] == [whole.body["prompt_logprobs"]]
    for name in ("logprobs", "explain", "token_ids"):
        assert [item for event in stream.events for item in event.get(name, [])] == output[name]
    assert len(output["logprobs"]) == len(output["token_ids"])
    prompt = whole.body["prompt_logprobs"]
    assert prompt[0] is None
    assert "".join(item["text"] for item in prompt[1:]) == ASK["prompt"][-len("".join(i["text"] for i in prompt[1:])) :]
    for item in output["logprobs"]:
        assert item["logprob"] <= 0
        assert len(item["top"]) == 2
    plain = ask(server)
    assert output["text"] == ASK["prompt"] + plain.text


def test_a_dry_run_generates_nothing(server: RunningServer) -> None:
    prompt = "The old lighthouse keeper counted boats. " * 6
    salt = {"prompt": prompt, "cache_salt": "dry"}
    before = ask(server, **salt, dry_run=True, return_token_ids=True).body
    assert (before["dry_run"], before["usage"]["cached_tokens"]) == (True, 0)
    assert before["usage"]["prompt_tokens"] == len(before["prompt_token_ids"])
    parameters = before["parameters"]
    assert (parameters["max_new_tokens"], parameters["seed"], parameters["temperature"]) == (12, 5, 0.9)
    ask(server, **salt)
    cached = ask(server, **salt, dry_run=True).body["usage"]["cached_tokens"]
    assert 0 < cached < before["usage"]["prompt_tokens"]
    assert ask(server, **salt).usage["cached_tokens"] == cached
    assert ask(server, prompt=prompt, dry_run=True).body["usage"]["cached_tokens"] == 0, "another salt"
    # Siblings find the prompt's full blocks; what a prompt's scores need is computed anew.
    assert ask(server, **salt, n=4).usage["cached_tokens"] == cached
    assert ask(server, **salt, prompt_logprobs=0).usage["cached_tokens"] == 0


def test_deadlines_and_truncation(server: RunningServer) -> None:
    late = ask(server, max_new_tokens=900, ignore_eos=True, deadline_ms=100)
    assert late.finish_reasons == ["deadline"]
    assert 0 < late.usage["completion_tokens"] < 900
    assert late.body["timings"]["total_ms"] < 400
    full = ask(server, prompt_token_ids=None, dry_run=True, return_token_ids=True).body["prompt_token_ids"]
    cut = ask(server, truncate_prompt_tokens=3, echo=True)
    ids = {"prompt": None, "prompt_token_ids": full[-3:]}
    assert cut.text == ask(server, **ids, echo=True).text
    assert cut.usage["prompt_tokens"] == 3

"""Real text from the embedded model over real HTTP, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from loadtests.processes import RunningServer
from tests.end_to_end.client import Answer, post

PROMPTS = [
    "Once upon a time",
    "“Hello,” said the fox.",
    "The café by the sea ☀️",
    "🐢 and 🦊 were friends. One day",
    "日本の小さな話",
    "ﷺ ẞ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🏳️‍🌈",
]
STOPS: list[list[str]] = [[], ["."], ["”"], ["the ", " and"], ["é"], ["\n"], ["ed to", "e"], ["☀️", "was a"]]


def random_request(rng: random.Random) -> dict[str, Any]:
    """High temperatures and a byte-level vocabulary give characters that are cut across tokens, and broken ones."""
    return {
        "prompt": rng.choice(PROMPTS),
        "max_new_tokens": rng.randint(1, 40),
        "temperature": rng.choice([0.0, 0.8, 1.5, 2.0]),
        "top_p": rng.choice([1.0, 0.95]),
        "top_k": 0,
        "stop": rng.choice(STOPS),
        "include_stop": rng.random() < 0.3,
        "skip_special_tokens": rng.random() < 0.7,
        "ignore_eos": rng.random() < 0.3,
        "return_token_ids": True,
        "seed": rng.getrandbits(40),
    }


def test_a_greedy_answer_is_english_and_repeatable(server: RunningServer) -> None:
    request = {"prompt": "Once upon a time", "max_new_tokens": 60, "temperature": 0}

    async def ask() -> list[Answer]:
        return [
            await post(server, request),
            await post(server, request),
            await post(server, request | {"stream": True}),
        ]

    first, second, streamed = asyncio.run(ask())
    assert first.status == 200
    assert first.text == second.text == streamed.text
    words = first.text.split()
    assert len(words) > 20
    assert {"the", "a", "and"} & set(words)


def test_streamed_deltas_join_to_the_whole_answer(server: RunningServer) -> None:
    rng = random.Random(11)
    requests = [random_request(rng) for _ in range(500)]

    async def ask() -> list[tuple[Answer, Answer]]:
        places = asyncio.Semaphore(24)

        async def pair(request: dict[str, Any]) -> tuple[Answer, Answer]:
            async with places:
                return await post(server, request), await post(server, request | {"stream": True})

        return await asyncio.gather(*map(pair, requests))

    pairs = asyncio.run(ask())
    for request, (whole, streamed) in zip(requests, pairs, strict=True):
        assert (whole.status, streamed.status) == (200, 200), (request, whole.body, streamed.body)
        assert streamed.text == whole.text, request
        assert streamed.token_ids == whole.token_ids, request
        assert streamed.finish_reasons == whole.finish_reasons
        assert streamed.event_ids == list(range(len(streamed.event_ids)))
        assert streamed.done
        assert whole.usage["completion_tokens"] == len(whole.token_ids) == streamed.usage["completion_tokens"]
    texts = [whole.text for whole, _ in pairs]
    assert sum(not text.isascii() for text in texts) > 50, "too few texts with multi-byte characters to prove anything"
    stopped = [whole.body["outputs"][0]["stop_reason"] for whole, _ in pairs]
    assert sum(isinstance(reason, str) for reason in stopped) > 100


def test_a_chat_is_answered(server: RunningServer) -> None:
    request = {"messages": [{"role": "user", "content": "Tell me a story about a fox."}], "seed": 5}
    answer = asyncio.run(post(server, request | {"max_new_tokens": 120}))
    assert answer.status == 200
    assert len(answer.text.split()) > 15
    assert answer.body["seed"] == 5


def test_info_names_the_identity(server: RunningServer) -> None:
    status, body = server.get("/info")
    info = json.loads(body)
    assert status == 200
    assert len(info["identity"]["weights_hash"]) == 64
    assert info["identity"]["architecture"] == "LlamaForCausalLM"
    assert info["identity"]["versions"].keys() >= {"stet", "torch", "python"}

"""The client of the HTTP comparison, a process of its own: streamed completions from some clients at once.

    python -m loadtests.peers.client URL --clients 4 --requests 2 --tokens 64 --seed 1

Prints one JSON line: completion tokens of all requests, seconds from the first send to the last end, and the time to
the first text of each request. All clients begin together; each sends its next request when its last one has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence

import httpx

from loadtests.peers.checkpoints import text

PROMPT_WORDS = 100


async def complete(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> tuple[int, float]:
    """One request. Returns its completion tokens and the seconds to its first text. Raises RuntimeError if it ends
    with another number of tokens than was asked for."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    first, count = None, 0
    started = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the server answered {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[len("data: ") :])
            if first is None and any(choice.get("text") for choice in chunk.get("choices", [])):
                first = time.perf_counter() - started
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
    if count != tokens or first is None:
        raise RuntimeError(f"asked for {tokens} tokens, the server counted {count}")
    return count, first


async def run(url: str, clients: int, requests: int, tokens: int, seed: int) -> dict[str, object]:
    """`clients` at once, each with `requests` requests one after another, whose prompts all differ."""
    prompts = [[text(PROMPT_WORDS, 10_000 * seed + 100 * c + r) for r in range(requests)] for c in range(clients)]
    # A connection for each request: llama-server closes idle ones, now and then just as the next request is sent.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        listed = await client.get("/v1/models")
        if listed.status_code != 200:
            raise RuntimeError(f"/v1/models was answered with {listed.status_code}")
        model = listed.json()["data"][0]["id"]

        async def one(own: list[str]) -> list[tuple[int, float]]:
            return [await complete(client, model, prompt, tokens) for prompt in own]

        started = time.perf_counter()
        results = [result for own in await asyncio.gather(*map(one, prompts)) for result in own]
        seconds = time.perf_counter() - started
    return {"tokens": sum(n for n, _ in results), "seconds": seconds, "first": [first for _, first in results]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers.client", description=__doc__)
    parser.add_argument("url")
    for name in ("clients", "requests", "tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    flags = parser.parse_args(arguments)
    print(json.dumps(asyncio.run(run(flags.url, flags.clients, flags.requests, flags.tokens, flags.seed))))


if __name__ == "__main__":
    main()

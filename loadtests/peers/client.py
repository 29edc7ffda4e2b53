"""The client of the HTTP comparison, a process of its own: streamed completions from some clients at once.

    python -m loadtests.peers.client URL --clients 4 --requests 2 --tokens 64 --seed 1

Prints one JSON line: completion tokens of all requests, seconds from the first send to the last end, and the time to
the first text of each request. All clients begin together; each sends its next request when its last one has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Sequence

from loadtests.peers.checkpoints import text
from server.bench.client import resolve
from server.bench.discovery import discover
from server.bench.measure import Load, measure
from server.bench.workload import Job

PROMPT_WORDS = 100
TIMEOUT_SECONDS = 600.0


def jobs(tokens: int, seed: int) -> Iterator[Job]:
    """Requests whose prompts all differ."""
    number = 10_000 * seed
    while True:
        yield Job(text(PROMPT_WORDS, number), tokens)
        number += 1


async def run(url: str, clients: int, requests: int, tokens: int, seed: int) -> dict[str, object]:
    """`clients` at once, each with `requests` requests one after another. Raises RuntimeError if one does not complete
    with as many tokens as were asked for."""
    target = await resolve(url)
    dialect, _, _ = await discover(target, "completions", None)
    load = Load(TIMEOUT_SECONDS, clients=clients, requests_each=requests, timeout=TIMEOUT_SECONDS)
    found = await measure(target, dialect, jobs(tokens, seed), load)
    for record in found.records:
        if record.error is not None:
            raise RuntimeError(f"a request failed: {record.error}")
        if record.usage.completion_tokens != tokens:
            raise RuntimeError(f"asked for {tokens} tokens, the server counted {record.usage.completion_tokens}")
    first = [record.first for record in found.records]
    return {"tokens": tokens * len(first), "seconds": found.seconds, "first": first}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers.client", description=__doc__)
    parser.add_argument("url")
    for name in ("clients", "requests", "tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    flags = parser.parse_args(arguments)
    print(json.dumps(asyncio.run(run(flags.url, flags.clients, flags.requests, flags.tokens, flags.seed))))


if __name__ == "__main__":
    main()

"""Two hundred clients at once, a third of whom leave at random: what everyone saw must fit together."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from loadtests.processes import RunningServer
from tests.end_to_end.client import Answer, metrics, post, until

NUM_CLIENTS = 200
LEAVING = 0.3


def engine_is_idle(server: RunningServer) -> bool:
    now = metrics(server)
    return (
        now["stet_requests_running"] == now["stet_requests_waiting"] == now['stet_kv_cache_blocks{state="used"}'] == 0
    )


def growth(before: dict[str, float], after: dict[str, float], prefix: str) -> float:
    """How much all series whose name starts with `prefix` have grown together."""
    return sum(value - before.get(name, 0.0) for name, value in after.items() if name.startswith(prefix))


def test_histories_of_two_hundred_clients(server: RunningServer) -> None:
    rng = random.Random(99)
    clients: list[tuple[dict[str, Any], int | None]] = []
    for i in range(NUM_CLIENTS):
        request = {
            "prompt": f"Once upon a time there was a fox number {i % 17}. " * rng.randint(1, 12),
            "max_new_tokens": rng.randint(1, 80),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": i,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        clients.append((request, rng.randint(0, 20) if rng.random() < LEAVING else None))

    async def run() -> list[Answer]:
        answers = await asyncio.gather(
            *(post(server, request, leave_after=leave_after) for request, leave_after in clients)
        )
        await until(lambda: engine_is_idle(server), 1.0, "all blocks free")
        return answers

    before = metrics(server)
    answers = asyncio.run(run())
    after = metrics(server)

    sent = 0
    for (request, _), answer in zip(clients, answers, strict=True):
        assert answer.event_ids == list(range(len(answer.event_ids)))
        if answer.cut:
            continue
        assert answer.status == 200
        assert answer.finish_reasons == ["length"], "exactly one terminal event"
        assert answer.done
        assert len(answer.token_ids) == request["max_new_tokens"] == answer.usage["completion_tokens"]
        sent += len(answer.token_ids)
    assert sum(answer.cut for answer in answers) > 0.2 * NUM_CLIENTS

    # Every request has exactly one outcome, and every token that was computed is in the books once.
    assert growth(before, after, "stet_requests_total{") == NUM_CLIENTS
    assert growth(before, after, "stet_generated_tokens_total") >= sent
    assert growth(before, after, "stet_engine_step_tokens_sum") == sum(
        growth(before, after, name)
        for name in (
            "stet_prompt_tokens_total",
            "stet_recomputed_tokens_total",
            "stet_generated_tokens_total",
            "stet_discarded_tokens_total{",
        )
    )

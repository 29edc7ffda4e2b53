"""Readers that are slow, that leave, that are cancelled in every phase: nothing of their requests is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from server.engine.request import FinishReason
from server.generation import GenerationRequest, Refusal
from tests.server.fake_engine import expected_tokens
from tests.server.harness import VOCABULARY, Answer, Server, collect, decode, ids_request, run


def test_a_slow_reader_costs_no_memory_and_holds_nobody_up(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        prompt = [7]
        answer = Answer()
        slow = server.service.generate(ids_request(prompt, seed=3, max_new_tokens=4000))
        answer.take(await anext(slow))
        quick = await collect(server.service, ids_request([8], seed=3, max_new_tokens=4000))
        assert quick.end.finish_reason is FinishReason.LENGTH
        (job,) = server.service._jobs
        assert job.mailbox is not None
        assert len(job.mailbox._arrivals) <= 1
        async for event in slow:
            answer.take(event)
        assert answer.ids[0] == expected_tokens(prompt, 3, 4000, vocab_size=VOCABULARY)
        assert answer.text == decode(answer.ids[0])
        assert len(answer.deltas) < 2000

    run(tmp_path, test)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_reader_that_leaves_in_the_middle(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        for count in (1, 2, 5):
            events = server.service.generate(ids_request([5], max_new_tokens=4000))
            for _ in range(count):
                await anext(events)
            await events.aclose()
            assert server.is_clean()
        assert server.books.outcomes == {"cancelled": 3}
        await asyncio.sleep(0.05)
        assert server.books.balanced
        assert server.books.discarded["abort"] > 0

    run(tmp_path, test, step_seconds=0.002)


def test_a_task_that_is_cancelled_in_every_phase(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        def begin(request: GenerationRequest) -> asyncio.Task[Answer]:
            return asyncio.create_task(collect(server.service, request))

        # Before it ran at all; while its text is tokenized in a thread; in the queue; in the middle of its tokens.
        await cancelled(begin(ids_request([5])))
        assert server.is_clean()
        long = begin(GenerationRequest(prompt="lorem ipsum " * 20_000))
        await asyncio.sleep(0)
        assert server.service.num_open == 1
        await cancelled(long)
        assert server.is_clean()
        running = begin(ids_request([5], max_new_tokens=4000))
        queued = begin(ids_request([6], max_new_tokens=4000))
        await asyncio.sleep(0.1)
        assert server.service.num_open == 2
        await cancelled(queued)
        await cancelled(running)
        assert server.is_clean()
        assert server.books.outcomes == {"cancelled": 3}
        # The engine has forgotten them as well.
        answer = await collect(server.service, ids_request([7], max_new_tokens=5))
        assert answer.completed is not None
        assert answer.completed.timings.queue_ms < 200
        await server.settled()

    run(tmp_path, test, step_seconds=0.005, max_running=1)


def test_cancellation_during_a_restart(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        tasks = [
            asyncio.create_task(collect(server.service, ids_request([i + 5], seed=i, max_new_tokens=100)))
            for i in range(6)
        ]
        while server.supervisor.restarts == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await cancelled(tasks[0])
        await cancelled(tasks[3])
        for i in (1, 2, 4, 5):
            assert (await tasks[i]).ids[0] == expected_tokens([i + 5], i, 100, vocab_size=VOCABULARY)
        assert server.books.outcomes == {"length": 4, "cancelled": 2}
        await server.settled()

    run(tmp_path, test, faulty_starts=1, crash_after=50, step_seconds=0.002)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_books_balance_after_a_storm(tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test(server: Server) -> None:
        rng = random.Random(5)

        async def one(i: int) -> None:
            await asyncio.sleep(rng.random() * 0.5)
            request = ids_request([i % 300 + 1], seed=i, max_new_tokens=rng.randint(1, 80), stop=("e", "\n"))
            events = server.service.generate(request)
            leave_after = rng.choice([None, None, 0, 1, 10])
            seen = 0
            try:
                async for _ in events:
                    seen += 1
                    if leave_after is not None and seen > leave_after:
                        break
                    if rng.random() < 0.05:
                        await asyncio.sleep(0.02)
            except Refusal as refusal:
                assert refusal.code in ("engine_restarting", "queue_full")  # noqa: PT017
            finally:
                await events.aclose()

        await asyncio.gather(*(one(i) for i in range(300)))
        assert server.is_clean()
        assert sum(server.books.outcomes.values()) == 300
        assert server.books.outcomes["error"] == 0
        await server.settled()

    options: dict[str, Any] = {"step_seconds": 0.001, "tokens_per_step": 2, "max_running": 16}
    run(tmp_path, test, loop_factory=loop_factory, crash_after=1000, faulty_starts=1, **options)

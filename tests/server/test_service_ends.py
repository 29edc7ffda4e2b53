"""Ends of the server, asked for or not: starts that fail, drains, crashes that change no text, hangs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from server.engine.request import FinishReason
from server.generation import GenerationRequest, Refusal
from server.supervisor import EngineFailed, Limits
from server.text.tokenizer import ModelText
from tests.server.fake_engine import expected_tokens
from tests.server.harness import VOCABULARY, Answer, Server, collect, decode, ids_request, run


@pytest.mark.parametrize(
    ("options", "message", "usage"),
    [
        ({"fail": "no such model", "fail_usage": True}, "no such model", True),
        ({"crash_at_load": True}, "exited with code 3", False),
        ({"model_path": "/nonexistent"}, "no tokenizer.json", True),
    ],
)
def test_a_server_that_cannot_start_says_why(
    tmp_path: Path, options: dict[str, Any], message: str, usage: bool
) -> None:
    async def test(server: Server) -> None:
        with pytest.raises(EngineFailed, match=message) as caught:
            await server.service.ready()
        assert caught.value.usage == usage
        assert server.service.state == "failed"
        assert message in (server.service.failure or "")
        with pytest.raises(Refusal) as refused:
            await collect(server.service, GenerationRequest(prompt="x"))
        assert refused.value.code == "engine_restarting"
        assert message not in refused.value.problems[0].message

    run(tmp_path, test, wait=False, **options)


def test_text_files_of_an_unexpected_shape_end_the_start_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> ModelText:
        raise KeyError("pattern")

    monkeypatch.setattr(ModelText, "load", broken)

    async def test(server: Server) -> None:
        with pytest.raises(EngineFailed, match="cannot be used: KeyError"):
            await server.service.ready()
        assert server.service.state == "failed"

    run(tmp_path, test, wait=False)


def test_drain_lets_requests_finish(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        task = asyncio.create_task(collect(server.service, ids_request([5], max_new_tokens=20)))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(server.service.drain(10.0))
        await asyncio.sleep(0)
        assert server.service.state == "draining"
        with pytest.raises(Refusal) as caught:
            await collect(server.service, ids_request([5]))
        assert caught.value.code == "draining"
        await draining
        assert (await task).end.finish_reason is FinishReason.LENGTH

    run(tmp_path, test, step_seconds=0.01)


def test_drain_ends_the_rest(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        running = asyncio.create_task(collect(server.service, ids_request([5], max_new_tokens=4000)))
        waiting = asyncio.create_task(collect(server.service, ids_request([6], max_new_tokens=4000)))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await server.service.drain(0.1)
        assert time.monotonic() - began < 0.9
        answer = await running
        assert answer.end.finish_reason is FinishReason.CANCELLED
        assert answer.started is not None
        assert answer.ids[0] == expected_tokens([5], answer.started.seed, len(answer.ids[0]), vocab_size=VOCABULARY)
        with pytest.raises(Refusal) as caught:
            await waiting
        assert caught.value.code == "draining"
        assert server.books.outcomes == {"cancelled": 1, "draining": 1}

    run(tmp_path, test, step_seconds=0.01, max_running=1)


# Crashes


@pytest.mark.parametrize("fault", [{"crash_after": 300}, {"crash_after": 300, "crash_signal": 9}])
def test_a_crash_changes_no_text(tmp_path: Path, fault: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        async def one(i: int) -> Answer:
            prompt = [10 + i, 20]
            answer = await collect(server.service, ids_request(prompt, seed=i, max_new_tokens=100))
            assert answer.ids[0] == expected_tokens(prompt, i, 100, vocab_size=VOCABULARY)
            assert answer.text == decode(answer.ids[0])
            return answer

        await asyncio.gather(*(one(i) for i in range(20)))
        assert server.supervisor.restarts == 1
        assert server.books.downs == 1
        await server.settled()
        assert server.books.delivered == 2000

    run(tmp_path, test, faulty_starts=1, max_running=8, step_seconds=0.001, **fault)


def test_new_requests_are_refused_while_the_engine_restarts(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        task = asyncio.create_task(collect(server.service, ids_request([5], max_new_tokens=50)))
        while server.service.state == "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert server.service.state == "engine_restarting"
        with pytest.raises(Refusal) as caught:
            await collect(server.service, ids_request([5]))
        assert caught.value.code == "engine_restarting"
        assert caught.value.retry_after is not None
        assert (await task).end.finish_reason is FinishReason.LENGTH
        await server.service.ready()

    run(tmp_path, test, faulty_starts=1, crash_after=20, step_seconds=0.002)


@pytest.mark.parametrize("position", [0, 7])
def test_a_poison_request_ends_alone(tmp_path: Path, position: int) -> None:
    async def test(server: Server) -> None:
        async def innocent(i: int) -> None:
            prompt = [10 + i]
            answer = await collect(server.service, ids_request(prompt, seed=i, max_new_tokens=60))
            assert answer.ids[0] == expected_tokens(prompt, i, 60, vocab_size=VOCABULARY)

        async def poison() -> None:
            if position == 0:
                with pytest.raises(Refusal, match="went down twice") as caught:
                    await collect(server.service, ids_request([99], max_new_tokens=60))
                assert caught.value.code == "internal"
                return
            answer = await collect(server.service, ids_request([99], max_new_tokens=60))
            assert answer.end.finish_reason is FinishReason.ERROR
            assert len(answer.ids[0]) == position
            assert answer.end.error is not None

        await asyncio.gather(*(innocent(i) for i in range(8)), poison(), *(innocent(i) for i in range(8, 12)))
        assert server.supervisor.restarts == 2
        assert server.books.outcomes == {"length": 12, "error": 1}
        await server.settled()

    run(tmp_path, test, poison_token=99, poison_position=position, step_seconds=0.002)


def test_three_crashes_a_minute_end_everything_with_the_cause(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        requests = [ids_request([i + 1], max_new_tokens=1000) for i in range(4)]
        answers = await asyncio.gather(*(collect(server.service, request) for request in requests))
        assert all(answer.end.finish_reason is FinishReason.ERROR for answer in answers)
        assert server.service.state == "failed"
        assert "exited with code 3" in (server.service.failure or "")
        with pytest.raises(EngineFailed):
            await server.service.ready()
        assert server.books.outcomes == {"error": 4}

    run(tmp_path, test, crash_after=100, step_seconds=0.002)


def test_a_dozen_kills_at_random_lose_and_double_nothing(tmp_path: Path) -> None:
    """Kills during a probation blame one request each, as they must; all others come out whole."""
    rng = random.Random(11)
    blamed = 0

    async def test(server: Server) -> None:
        async def one(i: int) -> str:
            prompt = [i + 1, 7]
            try:
                answer = await collect(server.service, ids_request(prompt, seed=i, max_new_tokens=150))
            except Refusal:
                return "refused"
            assert answer.ids[0] == expected_tokens(prompt, i, len(answer.ids[0]), vocab_size=VOCABULARY)
            assert answer.text == decode(answer.ids[0])
            return answer.end.finish_reason.value

        client, engine_down = server.client, server.client.engine_down

        def count_blame() -> None:
            nonlocal blamed
            blamed += client._probation is not None and client._probation.engine_id is not None
            engine_down()

        client.engine_down = count_blame

        async def kill() -> None:
            for _ in range(12):
                await server.supervisor.wait_ready()
                await asyncio.sleep(rng.random() * 0.05)
                os.kill(server.supervisor.pid or 0, signal.SIGKILL)
                while server.supervisor.state == "ready":  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

        *outcomes, _ = await asyncio.gather(*(one(i) for i in range(40)), kill())
        assert server.supervisor.restarts == 12
        assert outcomes.count("length") == 40 - blamed
        assert server.books.outcomes["error"] == blamed
        await server.settled()

    run(tmp_path, test, limits=Limits(tick=0.02, crashes=100), step_seconds=0.005, max_running=24)


@pytest.mark.parametrize("fault", ["hang_after", "stop_after", "garbage_after"])
def test_a_hang_is_a_crash(tmp_path: Path, fault: str) -> None:
    async def test(server: Server) -> None:
        answer = await collect(server.service, ids_request([5], seed=1, max_new_tokens=60))
        assert answer.ids[0] == expected_tokens([5], 1, 60, vocab_size=VOCABULARY)
        assert server.supervisor.restarts == 1

    limits = Limits(tick=0.02, step=0.4, silence=0.4)
    options: dict[str, Any] = {fault: 20}
    run(tmp_path, test, limits=limits, faulty_starts=1, **options)

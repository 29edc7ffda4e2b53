"""kill -9 of the engine under load: nobody hangs, nothing is lost, every text is the undisturbed one.

Five times, or as many as the environment variable STET_KILLS says.
"""

from __future__ import annotations

import asyncio
import json
import operator
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.processes import RunningServer, running_server
from tests.end_to_end.client import Answer, metrics, post, until

NUM_KILLS = int(os.environ.get("STET_KILLS", "5"))
NUM_CLIENTS = 6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    # The usual limit of three crashes a minute is what this test is not about.
    with running_server(["--max-crashes-per-minute", "1000"], log=tmp_path / "log") as server:
        server.wait_ready()
        yield server


def engine_pid(server: RunningServer) -> int | None:
    """The server's child process, as long as it lives."""
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"server.engine.process" in command:
                return int(child)
    return None


# Long enough to be cut off in the middle.
ANIMALS = {"type": "array", "items": {"enum": ["fox", "owl", "hen", "bee"]}, "minItems": 25, "maxItems": 40}
ARGUMENTS = {"type": "object", "properties": {"them": ANIMALS}, "required": ["them"], "additionalProperties": False}
FEED = {"type": "function", "function": {"name": "feed", "parameters": ARGUMENTS, "strict": True}}


def a_request(rng: random.Random, kind: int) -> tuple[str, dict[str, Any]]:
    """A path and a body: of four kinds the last two are held to a schema, by name and by a tool."""
    drawn = {"temperature": rng.choice([0.0, 1.0]), "seed": rng.randrange(4), "stream": True}
    if kind == 2:
        body = {"prompt": "Animals: ", "json_schema": ANIMALS, "max_new_tokens": 250, "return_token_ids": True}
        return "/generate", body | drawn
    if kind == 3:
        asked = [{"role": "user", "content": rng.choice(["Feed them.", "Who is hungry?"])}]
        body = {"model": "stet-tales", "messages": asked, "tools": [FEED], "tool_choice": "required"}
        return "/v1/chat/completions", body | drawn | {"max_tokens": 300, "n": 2}
    return "/generate", {
        "prompt": rng.choice(["Once upon a time", "A little fox", "In the old house by the river"]),
        "max_new_tokens": rng.randint(60, 160),
        "temperature": rng.choice([0.0, 0.8]),
        "repetition_penalty": rng.choice([1.0, 1.1]),
        "seed": rng.randrange(4),
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


def said(answer: Answer) -> dict[int, str]:
    """What each choice of a chat came to: its text, its calls' arguments, and why it ended."""
    parts: dict[int, list[str]] = {}
    for event in answer.events:
        for choice in event["choices"]:
            delta, calls = choice["delta"], choice["delta"].get("tool_calls") or []
            words = [delta.get("content") or "", *(call["function"].get("arguments") or "" for call in calls)]
            parts.setdefault(choice["index"], []).extend([*words, choice["finish_reason"] or ""])
    return {index: "".join(words) for index, words in parts.items()}


def test_kill_the_engine_again_and_again_under_load(server: RunningServer) -> None:
    finished: list[tuple[str, dict[str, Any], Answer]] = []
    num_finished = [0] * NUM_CLIENTS
    detections: list[float] = []
    recoveries: list[float] = []

    async def client(number: int, stopped: asyncio.Event) -> None:
        rng = random.Random(number)
        while not stopped.is_set():
            path, request = a_request(rng, number % 4)
            answer = await asyncio.wait_for(post(server, request, path=path), timeout=60)
            if answer.status == 503:  # refused while the engine restarts: nothing was begun
                await asyncio.sleep(0.1)
                continue
            finished.append((path, request, answer))
            num_finished[number] += 1

    def status() -> int:
        return server.get("/readyz")[0]

    async def kill_and_wait() -> None:
        pid = engine_pid(server)
        assert pid is not None
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: status() == 503, 1.0, "the crash is noticed")
        detections.append(time.monotonic() - killed)
        await until(lambda: status() == 200, 10.0, "the engine is back")
        recoveries.append(time.monotonic() - killed)

    async def run() -> None:
        stopped = asyncio.Event()
        clients = [asyncio.create_task(client(i, stopped)) for i in range(NUM_CLIENTS)]
        for _ in range(NUM_KILLS):
            await until(lambda: metrics(server)["stet_requests_running"] > NUM_CLIENTS // 2, 10.0, "the load is back")
            await asyncio.sleep(random.random() * 0.3)
            before = list(num_finished)
            await kill_and_wait()
            # What was cut off once ends before the next cut, so that no request sees two.
            await until(lambda before=before: all(map(operator.gt, num_finished, before)), 60.0, "requests finish")
        stopped.set()
        await asyncio.gather(*clients)

    asyncio.run(run())

    undisturbed: dict[str, Answer] = {}
    for path, request, answer in finished:
        assert answer.status == 200
        key = repr(sorted(request.items()))
        if key not in undisturbed:
            undisturbed[key] = asyncio.run(post(server, request, path=path))
        right = undisturbed[key]
        if path != "/generate":
            assert said(answer) == said(right)
            assert all(words.endswith("}tool_calls") for words in said(answer).values()), said(answer)
            continue
        assert answer.event_ids == list(range(len(answer.event_ids)))
        assert answer.finish_reasons == right.finish_reasons == ["stop" if "json_schema" in request else "length"]
        if "json_schema" in request:
            assert 25 <= len(json.loads(answer.text)) <= 40
        else:
            assert len(answer.token_ids) == request["max_new_tokens"]
        assert len(answer.token_ids) == answer.usage["completion_tokens"]
        assert answer.token_ids == right.token_ids
        assert answer.text == right.text
    assert metrics(server)["stet_engine_restarts_total"] == NUM_KILLS
    print(
        f"\n{NUM_KILLS} kills, {len(finished)} streams; noticed after at most {max(detections):.3f} s, "
        f"ready again after at most {max(recoveries):.2f} s"
    )

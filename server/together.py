"""Several prompts of one request, carried out side by side as one: their choices numbered on, their usage summed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence

from server.engine.request import FinishReason
from server.generation import ChoiceFinished, Completed, Event, GenerationRequest, Refusal, Started, Timings, Usage
from server.preparation import Preparation


async def resolve_all(requests: Sequence[GenerationRequest], preparation: Preparation) -> list[GenerationRequest]:
    """The requests with their prompts as tokens and one seed, once nothing is wrong with any. Raises Refusal, whose
    problems say which prompt they are of."""
    seed = requests[0].seed if requests[0].seed is not None else secrets.randbelow(2**53)
    resolved: list[GenerationRequest] = []
    for position, request in enumerate(requests):
        try:
            prompt, _ = await preparation.resolve(request)
        except Refusal as refusal:
            names = {name: f"{name}[{position}]" for name in ("prompt", "prompt_token_ids")}
            problems = [
                dataclasses.replace(problem, param=names.get(problem.param or "", problem.param))
                for problem in refusal.problems
            ]
            raise Refusal(refusal.code, problems, refusal.retry_after) from refusal
        resolved.append(dataclasses.replace(request, prompt=None, prompt_token_ids=tuple(prompt), seed=seed))
    return resolved


async def generate_all(
    requests: Sequence[GenerationRequest], generate: Callable[[GenerationRequest], AsyncGenerator[Event, None]]
) -> AsyncGenerator[Event, None]:
    """The events of all, as they come, as those of one request; each with the same `n`. What one raises ends all, but
    for the deadline: with a token of another one there is an answer, in which this one's choices end by it, empty."""
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(4 * len(requests))

    async def run(position: int, request: GenerationRequest) -> None:
        try:
            async with contextlib.aclosing(generate(request)) as events:
                async for event in events:
                    await queue.put((position, event))
        except Exception as error:
            await queue.put((position, error))

    # Each takes its places and hands its tokens to the engine before it first waits, and so before any first event.
    tasks = [asyncio.create_task(run(position, request)) for position, request in enumerate(requests)]
    started = False
    ends: list[Completed] = []
    late: dict[int, Refusal] = {}
    try:
        while len(ends) + len(late) < len(requests):
            position, event = await queue.get()
            if isinstance(event, Refusal) and event.code == "deadline":
                late[position] = event
            elif isinstance(event, Exception):
                raise event
            elif isinstance(event, Completed):
                ends.append(event)
            elif isinstance(event, Started):
                if not started:
                    yield event
                started = True
            else:
                yield dataclasses.replace(event, index=position * requests[0].n + event.index)
        for position, refusal in late.items():
            if not started:
                raise refusal
            for index in range(requests[0].n):
                yield ChoiceFinished(position * requests[0].n + index, FinishReason.DEADLINE)
            prompt = requests[position].prompt_token_ids or ()
            ends.append(Completed(ends[0].seed, Usage(len(prompt), 0, 0), ends[0].timings))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    yield _sum(ends)


def _sum(ends: Sequence[Completed]) -> Completed:
    """One end for several prompts: tokens added up; of the times, which ran side by side, the longest."""
    usage = Usage(
        sum(end.usage.prompt_tokens for end in ends),
        sum(end.usage.completion_tokens for end in ends),
        sum(end.usage.cached_tokens for end in ends),
    )
    times = zip(*(dataclasses.astuple(end.timings) for end in ends), strict=True)
    return Completed(ends[0].seed, usage, Timings(*map(max, times)))

"""From the body of an OpenAI-shaped route to a call of the service."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request

from server.generation import Event, GenerationRequest, Problem
from server.http.auth import sign
from server.http.errors import HttpError
from server.http.generate import Call, Generator, dry_run_of, is_large, merge, read_object, refuse
from server.http.limits import Limits
from server.http.openai.schemas import ParsedCall, parse_chat, parse_completion
from server.http.openai.writers import BodyBuilder, ChunkWriter, Shape
from server.http.routes import CHAT, COMPLETIONS
from server.http.sse import Show


class ModelService(Generator, Protocol):
    """What this module needs of server.service.Service, beside generation."""

    @property
    def model(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def generate_together(self, requests: Sequence[GenerationRequest], endpoint: str) -> AsyncIterator[Event]: ...


async def read_chat(request: Request, service: ModelService, limits: Limits) -> Call:
    """The checked body of /v1/chat/completions. Raises HttpError."""
    return await _read(request, service, limits, parse_chat, CHAT)


async def read_completion(request: Request, service: ModelService, limits: Limits) -> Call:
    """The checked body of /v1/completions. Raises HttpError."""
    return await _read(request, service, limits, parse_completion, COMPLETIONS)


async def _read(
    request: Request,
    service: ModelService,
    limits: Limits,
    parse: Callable[[Mapping[str, Any]], ParsedCall],
    endpoint: str,
) -> Call:
    sent = await read_object(request, limits)
    parsed = await asyncio.to_thread(parse, sent) if is_large(sent) else parse(sent)
    found: list[Problem] = []
    for position, wanted in enumerate(parsed.requests):
        # The prompts share all that is not a prompt: it is checked with the first.
        asked = wanted if position == 0 else GenerationRequest(prompt_token_ids=wanted.prompt_token_ids)
        for problem in service.problems(asked):
            if problem.param == "prompt_token_ids" and len(parsed.requests) > 1:
                problem = dataclasses.replace(problem, param=f"prompt_token_ids[{position}]")
            found = merge(found, [parsed.respell(problem)])
    check_model(service, parsed.model, merge(parsed.problems, found), parsed.unsupported)

    requests = [sign(request.scope, wanted) for wanted in parsed.requests]
    first = requests[0]
    shape = Shape(
        chat=endpoint == CHAT,
        fingerprint=service.fingerprint,
        num_choices=first.n * len(requests),
        choices_per_prompt=first.n,
        include_usage=parsed.include_usage,
        show=Show.of(first),
        echo=first.echo,
        own_id=first.request_id is not None,
        skips_special=first.skip_special_tokens,
    )

    def events() -> AsyncIterator[Event]:
        if len(requests) == 1:
            return service.generate(first, endpoint)
        return service.generate_together(requests, endpoint)

    return Call(
        endpoint,
        parsed.stream,
        shape.num_choices,
        events,
        lambda: ChunkWriter(shape),
        lambda: BodyBuilder(shape),
        parsed.respell,
        dry_run_of(service, first, endpoint) if parsed.dry_run else None,
    )


def check_model(service: ModelService, name: str | None, problems: list[Problem], unsupported: list[Problem]) -> None:
    """Raise HttpError for anything wrong: 404 if it is the model's name alone, for which clients have an exception."""
    if name is None or not service.model or name == service.model:
        refuse(problems, unsupported)
        return
    unknown = Problem("model", f"The model of that name is not served here: {service.model} is.", name, service.model)
    refuse(merge(problems, [unknown]) if problems else [], unsupported if problems else [])
    raise HttpError("model_not_found", [unknown, *unsupported])

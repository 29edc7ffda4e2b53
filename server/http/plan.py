"""`POST /plan`: what a model would need and how fast it would be, on this server's device or on a card by its name.

Nothing is downloaded or measured, and no file is read but the served model's configuration: a request could otherwise
look at the server's disk, make it call out, or take its processor from those it serves.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from server.engine.config import EngineConfig
from server.engine.memory import available_memory_bytes
from server.generation import Problem
from server.http.errors import HttpError
from server.http.fields import Words, allowed_of, check, parameter, unknown_names
from server.http.generate import Generator, merge, read_object, refuse
from server.http.limits import Limits
from server.http.sse import encode_json
from server.planner import plan as planning
from server.planner.device import LocalDevice, PlannedDevice, card
from server.planner.rates import CARDS
from server.planner.report import as_dict
from server.planner.sizes import MODES
from server.planner.subject import COUNT_WORDS, PlanError, Subject, config_of_count, of_config, of_folder, parse_count

_MAX_MESSAGE_CHARS = 400
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
_KV_DTYPES = ("auto", "bf16", "int8")


class PlanBody(BaseModel):
    """The parameters of /plan."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = parameter(
        f"the name of the served model, or {COUNT_WORDS}",
        "not beside `config`",
        shown="the served model",
        max_length=256,
    )
    config: dict[str, Any] | None = parameter("an object: the content of a config.json", "not beside `model`")
    device: str | None = parameter(
        f"one of {', '.join(CARDS)}", "a card by its published figures", shown="the server's own", max_length=64
    )
    memory: int | None = parameter("an integer from 1 to 2^60: bytes", shown="what the device has free", ge=1, le=2**60)
    quantization: str | None = parameter(f"one of {', '.join(MODES)}", shown="all, side by side", max_length=64)
    kv_cache_dtype: str | None = parameter(f"one of {', '.join(_KV_DTYPES)}", shown="auto", max_length=64)
    context: int | None = parameter(
        f"an integer from 1 to {planning.MAX_CONTEXT}",
        "tokens of one sequence",
        shown="what the model was made for",
        ge=1,
        le=planning.MAX_CONTEXT,
    )
    concurrency: int | None = parameter(
        f"an integer from 1 to {planning.MAX_CONCURRENCY}",
        "sequences at once",
        shown=str(planning.ENGINE.max_running),
        ge=1,
        le=planning.MAX_CONCURRENCY,
    )
    max_tokens_per_step: int | None = parameter(
        "an integer from 1 to 1000000", shown=str(planning.ENGINE.max_tokens_per_step), ge=1, le=1_000_000
    )
    train_devices: int | None = parameter(
        f"an integer from 1 to {planning.MAX_DEVICES}", shown="1", ge=1, le=planning.MAX_DEVICES
    )
    train_batch: int | None = parameter(
        "an integer from 1 to 1000000", "sequences on each device", shown="1", ge=1, le=1_000_000
    )
    train_context: int | None = parameter(
        f"an integer from 1 to {planning.MAX_CONTEXT}",
        "tokens of each of these",
        shown="the context",
        ge=1,
        le=planning.MAX_CONTEXT,
    )


_CHOICES = {"device": tuple(CARDS), "quantization": MODES, "kv_cache_dtype": _KV_DTYPES}


class PlanService(Generator, Protocol):
    """What this module needs of server.service.Service."""

    @property
    def model(self) -> str: ...

    @property
    def model_folder(self) -> Path | None: ...

    @property
    def engine_config(self) -> EngineConfig: ...


class PlanRoute:
    """Answers /plan. Owns what is known of the server's own device, which a child process is asked for once."""

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._device: PlannedDevice | None = None

    async def answer(self, request: Request, service: PlanService, limits: Limits) -> bytes:
        """The body of the answer. Raises HttpError."""
        sent = await read_object(request, limits)
        checked = check(PlanBody, sent, Words())
        problems = unknown_names(sent, list(PlanBody.model_fields)) + checked.problems
        problems += _choice_problems(checked.valid)
        refuse(problems, [])
        subject = await self._subject(checked.valid, service)
        device = card(checked.valid.device) if checked.valid.device else await self._own_device(service)
        try:
            return await asyncio.to_thread(_plan, subject, device, checked.valid)
        except PlanError as error:
            raise _refusal(error) from None

    async def _subject(self, body: PlanBody, service: PlanService) -> Subject:
        if body.model is not None and body.config is not None:
            text = "Only one of model and config may be given."
            raise HttpError("invalid_request", [Problem("config", text, None, "leave it out")])
        try:
            if body.config is not None:
                return await asyncio.to_thread(of_config, body.config)
            if body.model is not None and body.model != service.model:
                return await asyncio.to_thread(_of_count, body.model)
        except PlanError as error:
            raise _refusal(error) from None
        folder = service.model_folder
        if folder is None or not service.model:
            raise HttpError("loading", [Problem(None, "The model is being loaded.")])
        try:
            return await asyncio.to_thread(of_folder, service.model, folder)
        except PlanError as error:  # it was read when the engine started: its loss is not the client's fault
            raise RuntimeError("the configuration of the served model cannot be read any more") from error

    async def _own_device(self, service: PlanService) -> PlannedDevice:
        config = service.engine_config
        local = LocalDevice(config.device, config.dtype, config.threads)
        async with self._asking:
            # What `stet plan` measures while the server runs is taken up; what it cannot write is at least remembered.
            found = await asyncio.to_thread(local.known) or self._device
            if found is None:
                try:
                    found = await asyncio.to_thread(lambda: local.load(measure=False))
                except PlanError as error:
                    raise RuntimeError("the server's device cannot be described") from error
            self._device = found
            return found


def _plan(subject: Subject, device: PlannedDevice, body: PlanBody) -> bytes:
    given = body.model_dump(exclude={"model", "config", "device"}, exclude_none=True)
    plan = planning.make_plan(subject, device, planning.PlanRequest(**given), available_memory_bytes())
    return encode_json(as_dict(plan))


def _of_count(text: str) -> Subject:
    count = parse_count(text)
    if count is None:
        raise PlanError(
            f"model must be the name of the served model or {COUNT_WORDS}: nothing is looked up or downloaded here, "
            "but the content of a config.json can be sent as config",
            "model",
        )
    return Subject(text.strip(), config_of_count(count), assumed=True)


def _choice_problems(body: PlanBody) -> list[Problem]:
    sent: Mapping[str, Any] = body.model_dump(include=set(_CHOICES), exclude_none=True)
    problems: list[Problem] = []
    for name, value in sent.items():
        if value not in _CHOICES[name]:
            allowed = allowed_of(PlanBody.model_fields[name])
            problems = merge(problems, [Problem(name, f"{name} must be {allowed}.", value, allowed)])
    return problems


def _refusal(error: PlanError) -> HttpError:
    """In the words of this route: parameters instead of flags, and of what was sent only what cannot be markup."""
    text = _FLAG.sub(lambda match: match[1].replace("-", "_"), str(error))
    text = "".join(character if character.isprintable() and character not in "<>&" else "?" for character in text)
    if len(text) > _MAX_MESSAGE_CHARS:
        text = text[:_MAX_MESSAGE_CHARS] + "…"
    return HttpError("invalid_request", [Problem(error.param, f"{text}.")])

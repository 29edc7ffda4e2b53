"""`POST /plan`: what a model would need and how fast it would be, on this server's device or on a card by its name.

Nothing is downloaded or measured, and no file is read but the served model's configuration: a request could otherwise
look at the server's disk, make it call out, or take its processor from those it serves.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from server.engine.config import EngineConfig
from server.generation import Problem
from server.http.errors import HttpError
from server.http.fields import Words, allowed_of, check, parameter, unknown_names
from server.http.generate import Generator, merge, read_object, refuse
from server.http.limits import Limits
from server.http.sse import encode_json
from server.planner import words
from server.planner.words import CARD_NAMES, COUNT_WORDS, KV_DTYPES, MODES, PlanError

if TYPE_CHECKING:
    from server.planner.device import PlannedDevice
    from server.planner.subject import Subject

_ENGINE = EngineConfig()
_MAX_MESSAGE_CHARS = 400
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")


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
        f"one of {', '.join(CARD_NAMES)}", "a card by its published figures", shown="the server's own", max_length=64
    )
    memory: int | None = parameter("an integer from 1 to 2^60: bytes", shown="what the device has free", ge=1, le=2**60)
    quantization: str | None = parameter(f"one of {', '.join(MODES)}", shown="all, side by side", max_length=64)
    kv_cache_dtype: str | None = parameter(f"one of {', '.join(KV_DTYPES)}", shown="auto", max_length=64)
    context: int | None = parameter(
        f"an integer from 1 to {words.MAX_CONTEXT}",
        "tokens of one sequence",
        shown="what the model was made for",
        ge=1,
        le=words.MAX_CONTEXT,
    )
    concurrency: int | None = parameter(
        f"an integer from 1 to {words.MAX_CONCURRENCY}",
        "sequences at once",
        shown=str(_ENGINE.max_running),
        ge=1,
        le=words.MAX_CONCURRENCY,
    )
    max_tokens_per_step: int | None = parameter(
        f"an integer from 1 to {words.MAX_TOKENS_PER_STEP}",
        shown=str(_ENGINE.max_tokens_per_step),
        ge=1,
        le=words.MAX_TOKENS_PER_STEP,
    )
    train_devices: int | None = parameter(
        f"an integer from 1 to {words.MAX_DEVICES}", shown="1", ge=1, le=words.MAX_DEVICES
    )
    train_batch: int | None = parameter(
        f"an integer from 1 to {words.MAX_BATCH}", "sequences on each device", shown="1", ge=1, le=words.MAX_BATCH
    )
    train_context: int | None = parameter(
        f"an integer from 1 to {words.MAX_CONTEXT}",
        "tokens of each of these",
        shown="the context",
        ge=1,
        le=words.MAX_CONTEXT,
    )


_CHOICES = {"device": CARD_NAMES, "quantization": MODES, "kv_cache_dtype": KV_DTYPES}


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
        body = checked.valid
        problems = unknown_names(sent, list(PlanBody.model_fields)) + checked.problems
        problems = merge(problems, _choice_problems(body))
        if body.model is not None and body.config is not None:
            text = "Only one of model and config may be given."
            problems.append(Problem("config", text, None, "leave it out"))
        refuse(problems, [])
        served = body.config is None and body.model in (None, service.model)
        folder = service.model_folder
        if served and (folder is None or not service.model):
            raise HttpError("loading", [Problem(None, "The model is being loaded.")])
        try:
            if not served or folder is None:
                subject = await asyncio.to_thread(_sent_subject, body)
            else:
                subject = await asyncio.to_thread(_served_subject, service.model, folder)
            device = None if body.device else await self._own_device(service.engine_config)
            return await asyncio.to_thread(_plan, subject, device, body)
        except PlanError as error:
            raise _refusal(error) from None

    async def _own_device(self, config: EngineConfig) -> PlannedDevice:
        async with self._asking:
            self._device = await asyncio.to_thread(_local_device, config, self._device)
            return self._device


# Each of these runs in a thread, and imports there what a server that is never asked for a plan need not wait for.


def _local_device(config: EngineConfig, remembered: PlannedDevice | None) -> PlannedDevice:
    """What `stet plan` has measured, even while the server ran; what cannot be written is at least remembered."""
    from server.planner.device import LocalDevice

    local = LocalDevice(config.device, config.dtype, config.threads)
    try:
        return local.known() or remembered or local.load(measure=False)
    except PlanError as error:
        raise RuntimeError("the server's device cannot be described") from error


def _served_subject(name: str, folder: Path) -> Subject:
    from server.planner.subject import of_folder

    try:
        return of_folder(name, folder)
    except PlanError as error:  # it was read when the engine started: its loss is not the client's fault
        raise RuntimeError("the configuration of the served model cannot be read any more") from error


def _sent_subject(body: PlanBody) -> Subject:
    from server.planner.subject import Subject, config_of_count, of_config, parse_count

    if body.model is None:
        return of_config(body.config or {})
    count = parse_count(body.model)
    if count is None:
        raise PlanError(
            f"model must be the name of the served model or {COUNT_WORDS}: nothing is looked up or downloaded here, "
            "but the content of a config.json can be sent as config",
            "model",
        )
    return Subject(body.model.strip(), config_of_count(count), assumed=True)


def _plan(subject: Subject, device: PlannedDevice | None, body: PlanBody) -> bytes:
    """device: None is the card of body."""
    from server.engine.memory import available_memory_bytes
    from server.planner.device import card
    from server.planner.plan import PlanRequest, make_plan
    from server.planner.report import as_dict

    given = body.model_dump(exclude={"model", "config", "device"}, exclude_none=True)
    device = device or card(body.device or "")
    return encode_json(as_dict(make_plan(subject, device, PlanRequest(**given), available_memory_bytes())))


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

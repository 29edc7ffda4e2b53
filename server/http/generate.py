"""What both dialects do with a request: from bytes to a checked call, and from its events to an answer or a stream."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.engine.request import FinishReason
from server.generation import (
    ChoiceFinished,
    Completed,
    DryRun,
    Event,
    GenerationRequest,
    Problem,
    PromptLogprobs,
    Refusal,
    Started,
    TextDelta,
)
from server.http.auth import sign
from server.http.errors import HttpError, error_response, internal_problem, refusal_response
from server.http.limits import Limits, parse_json_object, read_body
from server.http.schemas import parse_generate
from server.http.sse import KEEP_ALIVE, AnswerBuilder, EventWriter, Show, dry_run_body

logger = logging.getLogger("stet.http")

# A body above this is parsed in a thread, so that one large prompt does not hold up everyone's streams.
_THREAD_ABOVE_BYTES = 32 * 1024

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies that buffer would hold tokens back.
    (b"x-accel-buffering", b"no"),
]


class Generator(Protocol):
    """What this module needs of server.service.Service."""

    def problems(self, request: GenerationRequest) -> list[Problem]: ...

    def generate(self, request: GenerationRequest, endpoint: str = "/generate") -> AsyncIterator[Event]: ...

    async def dry_run(self, request: GenerationRequest, endpoint: str = "/generate") -> DryRun: ...


class StreamWriter(Protocol):
    """One request's events as the bytes of a stream. Empty bytes are not sent."""

    def started(self, event: Started) -> bytes: ...

    def delta(self, event: TextDelta) -> bytes: ...

    def prompt(self, event: PromptLogprobs) -> bytes: ...

    def finished(self, event: ChoiceFinished) -> bytes: ...

    def completed(self, event: Completed) -> bytes: ...

    def failed(self, open_outputs: Sequence[int], code: str, problems: Sequence[Problem]) -> bytes: ...


class AnswerWriter(Protocol):
    """One request's events as one JSON body."""

    def delta(self, event: TextDelta) -> None: ...

    def prompt(self, event: PromptLogprobs) -> None: ...

    def finished(self, event: ChoiceFinished) -> None: ...

    def answer(self, started: Started, event: Completed) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Call:
    """A body in either dialect, checked: what to ask of the service, and how to write what comes of it.

    endpoint      the route, as the metrics name it
    num_outputs   choices of all prompts
    events        starts it: the events of the service, or of several requests as one
    respell       a problem of the service in the words of this dialect
    dry_run       the body of the answer instead, where nothing is to be generated
    """

    endpoint: str
    stream: bool
    num_outputs: int
    events: Callable[[], AsyncIterator[Event]]
    writer: Callable[[], StreamWriter]
    builder: Callable[[], AnswerWriter]
    respell: Callable[[Problem], Problem] = lambda problem: problem
    dry_run: Callable[[], Awaitable[bytes]] | None = None


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object of a body, within the limits. Raises HttpError, ClientGone."""
    body = await read_body(request.headers, request.receive, limits)
    if len(body) > _THREAD_ABOVE_BYTES:
        return await asyncio.to_thread(parse_json_object, body)
    return parse_json_object(body)


async def read_generate(request: Request, service: Generator, limits: Limits) -> Call:
    """The checked body of /generate. Raises HttpError with every problem that the body and the limits can show."""
    sent = await read_object(request, limits)
    parsed = await asyncio.to_thread(parse_generate, sent) if is_large(sent) else parse_generate(sent)
    wanted = parsed.request
    refuse(merge(parsed.problems, service.problems(wanted)), parsed.unsupported)
    wanted = sign(request.scope, wanted)
    return Call(
        "/generate",
        parsed.stream,
        wanted.n,
        lambda: service.generate(wanted),
        lambda: EventWriter(Show.of(wanted), wanted.request_id),
        lambda: AnswerBuilder(Show.of(wanted)),
        dry_run=dry_run_of(service, wanted) if parsed.dry_run else None,
    )


def dry_run_of(
    service: Generator, request: GenerationRequest, endpoint: str = "/generate"
) -> Callable[[], Awaitable[bytes]]:
    """What answers instead of a generation."""

    async def answer() -> bytes:
        return dry_run_body(await service.dry_run(request, endpoint), request.return_token_ids)

    return answer


def is_large(sent: Mapping[str, Any]) -> bool:
    """Whether checking a body would hold up the streams: only long lists and objects in it take time."""
    return any(isinstance(value, list | dict) and len(value) > 4096 for value in sent.values())


def refuse(problems: list[Problem], unsupported: list[Problem]) -> None:
    """Raise HttpError if there is anything wrong with a body, or wished in it that is not carried out."""
    if problems:
        raise HttpError("invalid_request", merge(problems, unsupported))
    if unsupported:
        raise HttpError("unsupported", unsupported)


def merge(first: list[Problem], second: list[Problem]) -> list[Problem]:
    """Both lists; of two problems of one parameter the first stays."""
    named = {problem.param for problem in first}
    return first + [problem for problem in second if problem.param not in named]


def known_params(problems: list[Problem], known: Collection[str]) -> list[str]:
    """The parameters of problems, for the log: only names of ours, since an unknown one may be a piece of a prompt."""
    names = {re.split(r"[.\[]", problem.param or "")[0] for problem in problems}
    return sorted(names & set(known))


class GenerationResponse(Response):
    """Carries a request out when it is awaited, and writes what comes of it.

    Nothing is sent before the request is admitted: a failure until then is a status. The service's generator is closed
    on every way out, at once when the client leaves. `fields` receives what the log line says about the request.
    """

    def __init__(self, call: Call, limits: Limits, fields: MutableMapping[str, Any]) -> None:
        self.background = None
        self._call = call
        self._limits = limits
        self._fields = fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = self._write_stream if self._call.stream else self._write_answer
        if self._call.dry_run is not None:
            write = self._write_dry_run
        work = asyncio.create_task(write(scope, receive, send))
        # The body has been read, so the next message is the end of the connection (or of our answer).
        gone = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    def _events(self) -> aclosing[Any]:
        return aclosing(cast("Any", self._call.events()))

    async def _write_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        builder = self._call.builder()
        started: Started | None = None
        failure: str | None = None
        response: Response | None = None
        try:
            async with self._events() as events:
                async for event in events:
                    match event:
                        case TextDelta():
                            builder.delta(event)
                        case Started():
                            started = event
                            self._fields["id"] = event.id
                        case PromptLogprobs():
                            builder.prompt(event)
                        case ChoiceFinished():
                            builder.finished(event)
                            self._note_finish(event)
                            if event.finish_reason is FinishReason.ERROR:
                                failure = event.error or internal_problem().message
                        case Completed():
                            self._note_usage(event)
                            if started is not None and failure is None:
                                body = builder.answer(started, event)
                                response = Response(body, media_type="application/json")
        except Refusal as refusal:
            self._fields["outcome"] = refusal.code
            response = refusal_response(self._respelled(refusal))
        if response is None:
            # Nothing has been sent, so a failure in the middle can still be a status instead of half a text.
            response = error_response("internal", [Problem(None, failure) if failure else internal_problem()])
        await response(scope, receive, send)

    async def _write_dry_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._call.dry_run is None:
            raise RuntimeError("nobody asked for a dry run")
        self._fields["dry_run"] = True
        try:
            response = Response(await self._call.dry_run(), media_type="application/json")
        except Refusal as refusal:
            self._fields["outcome"] = refusal.code
            response = refusal_response(self._respelled(refusal))
        await response(scope, receive, send)

    async def _write_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = self._call.writer()
        wire = _Wire(send, self._limits)
        ticker = asyncio.create_task(wire.keep_alive())
        open_outputs = set(range(self._call.num_outputs))
        failed: tuple[str, list[Problem]] | None = None
        completed: Completed | None = None
        try:
            async with self._events() as events:
                async for event in events:
                    match event:
                        case TextDelta():
                            data = writer.delta(event)
                            if data:
                                await wire.write(data)
                        case Started():
                            self._fields["id"] = event.id
                            data = writer.started(event)
                            if data:
                                await wire.write(data)
                            else:
                                await wire.start()
                        case PromptLogprobs():
                            data = writer.prompt(event)
                            if data:
                                await wire.write(data)
                        case ChoiceFinished():
                            self._note_finish(event)
                            if event.finish_reason is FinishReason.ERROR:
                                problem = Problem(None, event.error) if event.error else internal_problem()
                                failed = ("internal", [problem])
                            else:
                                open_outputs.discard(event.index)
                                await wire.write(writer.finished(event))
                        case Completed():
                            self._note_usage(event)
                            completed = event
        except Refusal as refusal:
            self._fields["outcome"] = refusal.code
            if not wire.started:
                ticker.cancel()
                await refusal_response(self._respelled(refusal))(scope, receive, send)
                return
            failed = (refusal.code, self._respelled(refusal).problems)
        except Exception:
            if not wire.started:
                raise
            logger.exception("a stream failed", extra={"fields": {"id": self._fields.get("id")}})
            failed = ("internal", [internal_problem()])
        finally:
            ticker.cancel()
        if failed is None and completed is not None:
            await wire.write(writer.completed(completed), last=True)
        else:
            code, problems = failed or ("internal", [internal_problem()])
            await wire.write(writer.failed(sorted(open_outputs), code, problems), last=True)

    def _respelled(self, refusal: Refusal) -> Refusal:
        problems = [self._call.respell(problem) for problem in refusal.problems]
        return Refusal(refusal.code, problems, refusal.retry_after)

    def _note_finish(self, event: ChoiceFinished) -> None:
        self._fields.setdefault("finish_reasons", []).append(event.finish_reason.value)

    def _note_usage(self, event: Completed) -> None:
        usage, timings = event.usage, event.timings
        self._fields.update(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            queue_ms=round(timings.queue_ms, 3),
            prefill_ms=round(timings.prefill_ms, 3),
            decode_ms=round(timings.decode_ms, 3),
        )


class _Wire:
    """The one writer of a stream's response. Its two users, the events and the keep-alive, never interleave."""

    def __init__(self, send: Send, limits: Limits) -> None:
        self.started = False
        self._send = send
        self._limits = limits
        self._lock = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._last_write = self._clock()

    async def start(self) -> None:
        """Send the status and the headers, once."""
        async with self._lock:
            await self._start()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send events, the headers first if they are not out yet. Waits while the client's buffers are full."""
        async with self._lock:
            await self._start()
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
            self._last_write = self._clock()

    async def keep_alive(self) -> None:
        """Send the headers after a long wait for admission, and a comment after each long silence. Never returns."""
        await asyncio.sleep(self._limits.admission_seconds)
        await self.start()
        while True:
            silence = self._clock() - self._last_write
            if silence >= self._limits.keep_alive_seconds:
                await self.write(KEEP_ALIVE)
            else:
                await asyncio.sleep(self._limits.keep_alive_seconds - silence)

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            self._last_write = self._clock()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

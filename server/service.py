"""One request from validated input to events. Both HTTP dialects call it; it runs without them as well.

`Service` holds what lives as long as the server, and hands each request on: to `server.served` for what the model makes
of it, to `server.places` for room, to `server.client` for its tokens, to `server.job` for what becomes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from server.client import EngineClient, Mailbox
from server.engine.config import EngineConfig
from server.engine.messages import Ready
from server.engine.request import FinishReason
from server.generation import (
    Completed,
    DryRun,
    ErrorCode,
    Event,
    GenerationRequest,
    Problem,
    Refusal,
    Started,
    TextDelta,
)
from server.job import Job
from server.places import Places
from server.preparation import DEFAULT_MAX_NEW_TOKENS, DEFAULTS, Preparation, context_of, effective_parameters
from server.served import ServedModel
from server.supervisor import EngineFailed, Supervisor
from server.together import generate_all, resolve_all
from server.version import VERSION

if TYPE_CHECKING:
    from server.metrics import Metrics
    from server.tracing import Tracer

ServiceState = Literal["loading", "ready", "draining", "engine_restarting", "failed"]


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What an operator may choose.

    max_waiting          places in the queue, beyond the engine's max_running
    default_deadline_ms  when a request does not say; None: none
    """

    max_waiting: int = 256
    default_deadline_ms: int | None = None


class Service:
    """Owns the requests being carried out, and the state of the whole: loading, ready, draining. One event loop."""

    def __init__(
        self,
        supervisor: Supervisor,
        metrics: Metrics,
        settings: ServiceSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[str, int], None] = lambda tenant, tokens: None,
        tracer: Tracer | None = None,
    ) -> None:
        """supervisor: one that was not started yet; the service starts and stops it. clock: seconds, monotonic.

        spent: is told, when a request has ended, its tenant and its tokens, those of the prompt and those delivered.
        tracer: makes spans of the requests.
        """
        self._supervisor = supervisor
        self._client = EngineClient(supervisor, metrics, clock=clock)
        self._metrics = metrics
        self._settings = settings or ServiceSettings()
        self._clock = clock
        self._model = ServedModel()
        self._loading: asyncio.Task[None] | None = None
        self._failure: EngineFailed | None = None
        self._draining = False
        self._spent = spent
        self._tracer = tracer
        self._places = Places(self._settings.max_waiting)
        self._jobs: set[Job] = set()
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(6)

    # Life

    @property
    def state(self) -> ServiceState:
        """Whether requests are accepted ("ready"), and if not, why not."""
        if self._draining:
            return "draining"
        if self._failure is not None or self._supervisor.state in ("failed", "stopped"):
            return "failed"
        if self._supervisor.state == "restarting":
            return "engine_restarting"
        if self._supervisor.state != "ready" or self._model.text is None:
            return "loading"
        return "ready"

    @property
    def failure(self) -> str | None:
        """Why the state is "failed": one line for the operator. It may hold a path."""
        return str(self._failure) if self._failure is not None else self._supervisor.failure

    @property
    def num_open(self) -> int:
        """Places taken: choices admitted and not ended."""
        return self._places.taken

    async def start(self) -> None:
        """Start the engine and begin to load. Does not wait: see `ready`. Raises OSError."""
        await self._supervisor.start()
        self._loading = asyncio.create_task(self._load(), name="service-loading")

    async def _load(self) -> None:
        try:
            await self._model.load(await self._supervisor.wait_ready())
        except EngineFailed as error:
            self._failure = error

    async def ready(self) -> None:
        """Wait until requests are accepted. Raises EngineFailed, with one line for the operator, if they never will."""
        if self._loading is None:
            raise RuntimeError("start() comes first")
        await asyncio.shield(self._loading)
        if self._failure is not None:
            raise self._failure
        await self._supervisor.wait_ready()

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - not a deadline: what is open then is ended
        """Refuse new requests, let the open ones finish for `timeout` seconds, then end the rest as CANCELLED."""
        self._draining = True
        try:
            await asyncio.wait_for(self._places.wait_until_free(), timeout)
        except TimeoutError:
            for job in list(self._jobs):
                job.cancel(self._client)
            # Their readers need a moment to pass on the last event; one that does not read is not waited for.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._places.wait_until_free(), 1.0)

    async def stop(self) -> None:
        """End everything at once, the engine too. `drain` first to let requests finish."""
        self._draining = True
        for job in list(self._jobs):
            job.cancel(self._client)
        await self._supervisor.stop()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        self._model.close()

    # What is known beforehand

    @property
    def model(self) -> str:
        """What the served model is called in requests and answers; "" until it is known."""
        return self._model.name

    @property
    def model_folder(self) -> Path | None:
        """Where the served model's files are; None until it is known. Not for clients."""
        ready = self._supervisor.ready
        return None if ready is None else Path(ready.model_path)

    @property
    def engine_config(self) -> EngineConfig:
        """The settings that the engine was started with."""
        return self._supervisor.config

    @property
    def fingerprint(self) -> str:
        """A short hash of the identity of /info: while it stays, a request with its seed gives the same text."""
        return self._model.fingerprint

    @property
    def context_length(self) -> int:
        """Tokens of one sequence, prompt and output; 0 until it is known."""
        ready = self._supervisor.ready
        return context_of(ready) if ready is not None else 0

    def info(self) -> dict[str, Any]:
        """Identity, limits, defaults and state: the body of /info. Holds no path."""
        ready, model = self._supervisor.ready, self._model
        known: dict[str, Any] = {"state": self.state, "version": VERSION}
        if ready is not None and model.name:
            known["model"] = model.name
            known["identity"] = model.identity(ready)
            known["context_length"] = context_of(ready)
            known["vocabulary"] = ready.vocab_size
            known["limits"] = {
                "max_running": ready.max_running,
                "max_waiting": self._settings.max_waiting,
                "kv_cache_tokens": ready.num_blocks * ready.block_size,
            }
            known["memory_bytes"] = ready.memory_bytes
            known["startup_seconds"] = ready.startup_seconds
            known["receipt"] = ready.receipt
        if model.text is not None:
            known["chat_template"] = model.text.template is not None
            known["defaults"] = {
                **DEFAULTS,
                **model.text.generation_defaults,
                "max_new_tokens": DEFAULT_MAX_NEW_TOKENS,
                "deadline_ms": self._settings.default_deadline_ms,
            }
        known["engine"] = {"restarts": self._supervisor.restarts}
        return known

    def problems(self, request: GenerationRequest) -> list[Problem]:
        """What is wrong with a request that the model's limits show without tokenizing. Empty before it is loaded."""
        preparation = self._model.preparation(self._supervisor.ready)
        if preparation is None:
            return []
        found = preparation.problems(request)
        capacity = self._places.capacity(preparation.ready.max_running)
        if request.n > capacity:
            message = f"n must not exceed the {capacity} places of this server."
            found.append(Problem("n", message, request.n, f"1 to {capacity}"))
        return found

    def refusal_of(self, tenant: str) -> Refusal | None:
        """Why any request of this tenant would be refused now, whatever is in it: no place is left. None if one is, or
        if nobody may have one yet."""
        ready = self._supervisor.ready
        if ready is None or self.state != "ready":
            return None
        try:
            self._places.check(1, tenant, ready.max_running, self._clock())
        except Refusal as refusal:
            return refusal
        return None

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """The ids of a request's prompt. Raises Refusal."""
        preparation = self._model.preparation(self._supervisor.ready)
        if preparation is None:
            raise self._not_ready()
        if problems := self.problems(request):
            raise Refusal("invalid_request", problems)
        return await preparation.prompt(request)

    def detokenize(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Raises Refusal."""
        ids = tuple(token_ids)
        text = self._model.text
        if text is None:
            raise self._not_ready()
        if problems := self.problems(GenerationRequest(prompt_token_ids=ids)):
            message = problems[0].message.replace("prompt_token_ids", "tokens")
            raise Refusal("invalid_request", [dataclasses.replace(problems[0], param="tokens", message=message)])
        return text.decode(ids, skip_special_tokens)

    # One request

    async def generate(self, request: GenerationRequest, endpoint: str = "/generate") -> AsyncGenerator[Event, None]:
        """The events of a request: Started once the first token is there, then text, ends, and Completed.

        A deadline counts from this call on.

        Raises Refusal, before the first event, if the request is not carried out. Closing the generator, or cancelling
        the task that waits for it, aborts the request.
        """
        began = self._clock()
        outcome: str | None = None
        job: Job | None = None
        mailbox: Mailbox | None = None
        timer: asyncio.TimerHandle | None = None
        reserved = False
        trace = None if self._tracer is None else self._tracer.begin(request, endpoint, began)
        try:
            preparation = self._ready()
            self._take_places(request, preparation.ready)
            reserved = True
            job = Job(request, began, self._metrics) if trace is None else trace.job(self._metrics)
            self._jobs.add(job)
            prompt_ids, params = await preparation.resolve(request)
            if job.cancelled:
                raise self._not_ready()
            deadline = self._deadline(request, preparation.ready, began)
            job.prepare(preparation.text, params, prompt_ids, self._clock())
            speech = preparation.speech(request, prompt_ids)
            mailbox = job.mailbox = self._client.open(
                prompt_ids,
                params,
                num_choices=request.n,
                priority=request.priority,
                tenant=request.tenant,
                cache_salt=request.cache_salt,
            )
            if deadline is not None:
                timer = asyncio.get_running_loop().call_later(deadline, job.expire, self._client)
            started = False
            while not job.ended:
                events = job.take(await mailbox.receive(), self._client)
                if not started and events:
                    if job.num_tokens == 0 and (job.ended or job.refused):
                        raise self._lost_before_start(job)
                    started = True
                    for event in self._opening(request, job, preparation, prompt_ids, params.seed):
                        yield event
                for event in events if speech is None else speech.split(events):
                    yield event
            yield Completed(params.seed, job.usage(), job.timings(self._clock()))
        except Refusal as refusal:
            outcome = FinishReason.ERROR.value if refusal.code == "internal" else refusal.code
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if mailbox is not None:
                self._client.close(mailbox)
            now = self._clock()
            if reserved:
                self._places.release(request.n, request.tenant, now)
            if job is not None:
                self._jobs.discard(job)
                self._spent(request.tenant, job.prompt_tokens + job.num_tokens)
            if outcome is None:
                # Ended as its choices did; or its reader went away, and GeneratorExit or CancelledError passes by.
                outcome = job.outcome if job is not None and job.ended else FinishReason.CANCELLED.value
            self._count(endpoint, outcome, job, began, now)
            if trace is not None:
                trace.end(self._model.name, outcome, job, now)

    async def dry_run(self, request: GenerationRequest, endpoint: str = "/generate") -> DryRun:
        """What a request would be: its parameters, its tokens, and how much of them is cached. Raises Refusal."""
        began = self._clock()
        outcome = "dry_run"
        try:
            return await self._dry_run(request)
        except BaseException as error:
            outcome = _outcome_of(error)
            raise
        finally:
            self._count(endpoint, outcome, None, began, self._clock())

    async def _dry_run(self, request: GenerationRequest) -> DryRun:
        preparation = self._ready()
        if problems := self.problems(request):
            raise Refusal("invalid_request", problems)
        prompt_ids, params = await preparation.resolve(request)
        mailbox = self._client.open(
            prompt_ids, params, tenant=request.tenant, cache_salt=request.cache_salt, dry_run=True
        )
        try:
            (arrival,) = await mailbox.receive()
        finally:
            self._client.close(mailbox)
        if arrival.first is None:
            raise Refusal("internal", [Problem(None, arrival.error or "The engine could not carry out this request.")])
        cached = arrival.first.cached_tokens
        parameters = effective_parameters(params)
        return DryRun(self._answer_id(request), self._model.name, parameters, tuple(prompt_ids), cached)

    def _opening(
        self, request: GenerationRequest, job: Job, preparation: Preparation, prompt_ids: list[int], seed: int
    ) -> Iterator[Event]:
        """What comes before the first new text: that it began, and of the prompt what was asked for."""
        yield Started(self._answer_id(request), self._model.name, seed)
        prompt_logprobs = job.prompt_logprobs()
        if prompt_logprobs is not None:
            yield prompt_logprobs
        if request.echo:
            echoed = preparation.prompt_text(request, prompt_ids)
            for index in range(request.n):
                yield TextDelta(index, echoed, ())

    def _answer_id(self, request: GenerationRequest) -> str:
        return request.request_id or f"gen-{self._id_prefix}{next(self._ids):06x}"

    def _deadline(self, request: GenerationRequest, ready: Ready, began: float) -> float | None:
        """Seconds that are left of a request's time; None if it has all of it. Raises Refusal if they cannot do.

        They cannot where the requests that wait before it took longer to get a place lately, as far as that is known.
        """
        milliseconds = request.deadline_ms or self._settings.default_deadline_ms
        if milliseconds is None:
            return None
        left = milliseconds / 1e3 - (self._clock() - began)
        wait = self._places.seconds_in_queue(ready.max_running, self._clock())
        if left <= 0 or (wait is not None and wait > left):
            message = f"deadline_ms is {milliseconds}{' here' if request.deadline_ms is None else ''}"
            message += f", and a place is free in about {math.ceil(wait or 0)} s." if left > 0 else ", which is over."
            raise Refusal("deadline", [Problem("deadline_ms", message, milliseconds, "more time")])
        return left

    async def generate_together(
        self, requests: Sequence[GenerationRequest], endpoint: str
    ) -> AsyncGenerator[Event, None]:
        """The events of several prompts as those of one request: their choices numbered on, their usage summed.

        All are carried out or none: every refusal comes before the first event. In the metrics each prompt is a request
        of its own, and they are one if they are refused together. All have the same `n` and one seed.
        """
        began = self._clock()
        try:
            preparation = self._ready()
            wanted = sum(request.n for request in requests)
            self._places.check(wanted, requests[0].tenant, preparation.ready.max_running, self._clock())
            requests = await resolve_all(requests, preparation)
        except BaseException as error:
            self._count(endpoint, _outcome_of(error), None, began, self._clock())
            raise
        together = generate_all(requests, lambda request: self.generate(request, endpoint))
        async with contextlib.aclosing(together) as events:
            async for event in events:
                yield event

    def _ready(self) -> Preparation:
        """What generation needs. Raises Refusal unless the state is "ready"."""
        preparation = self._model.preparation(self._supervisor.ready)
        if self.state != "ready" or preparation is None:
            raise self._not_ready()
        return preparation

    def _take_places(self, request: GenerationRequest, ready: Ready) -> None:
        """Those of a request in which nothing is wrong that can be seen so far. Raises Refusal."""
        if problems := self.problems(request):
            raise Refusal("invalid_request", problems)
        self._places.take(request.n, request.tenant, ready.max_running, self._clock())

    def _not_ready(self) -> Refusal:
        state = self.state
        said: dict[ServiceState, tuple[ErrorCode, str, int | None]] = {
            "loading": ("loading", "The model is being loaded.", 2),
            "draining": ("draining", "The server is shutting down.", 5),
            "engine_restarting": ("engine_restarting", "The engine is being started again.", 2),
            # 503, like the others, so that a balancer looks elsewhere; waiting does not help here, so no Retry-After.
            "failed": ("engine_restarting", "The engine has failed and is not started again.", None),
            "ready": ("internal", "The request was ended.", None),
        }
        code, message, retry_after = said[state]
        return Refusal(code, [Problem(None, message)], retry_after)

    def _lost_before_start(self, job: Job) -> Refusal:
        if job.expired:
            return Refusal("deadline", [Problem("deadline_ms", "The deadline passed before the first token.")])
        if job.cancelled:
            return self._not_ready()
        if job.refused and job.error is not None:
            # The engine has the last word: with its own tokens a grammar may cost more than it did here.
            kind = job.grammar_param
            code: ErrorCode = "invalid_request" if kind is None else "unsupported_grammar"
            return Refusal(code, [Problem(kind, f"{job.error}.", None, "another grammar" if kind else None)])
        return Refusal("internal", [Problem(None, job.error or "The engine could not carry out this request.")])

    def _count(self, endpoint: str, outcome: str, job: Job | None, began: float, now: float) -> None:
        timings = job.timings(now) if job is not None else None
        answered = job is not None and job.num_tokens > 0
        self._metrics.request_finished(
            endpoint,
            outcome,
            duration=now - began,
            queue=timings.queue_ms / 1e3 if timings is not None and answered else None,
            prefill=timings.prefill_ms / 1e3 if timings is not None and answered else None,
            decode=timings.decode_ms / 1e3 if timings is not None and answered else None,
            prompt_tokens=job.prompt_tokens if job is not None else 0,
            generated_tokens=job.num_tokens if job is not None else 0,
            exemplar=job.exemplar if job is not None else None,
        )


def _outcome_of(error: BaseException) -> str:
    """How a request ended, in the metrics, that raised this before its first event."""
    if isinstance(error, Refusal):
        return error.code
    return "internal" if isinstance(error, Exception) else FinishReason.CANCELLED.value

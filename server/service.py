"""One request from validated input to events. Both HTTP dialects call it; it runs without them as well.

`Service` holds what lives as long as the server: the model's text side, and the requests being carried out. How many
they may be is in `server.places`, what happens to one of them on its way in `server.job`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    Timings,
    Usage,
)
from server.job import Job
from server.places import Places
from server.preparation import DEFAULTS, Preparation, context_of, effective_parameters
from server.supervisor import EngineFailed, Supervisor
from server.text.tokenizer import ModelText, ModelTextError
from server.version import VERSION

if TYPE_CHECKING:
    from server.metrics import Metrics
    from server.tracing import Tracer

logger = logging.getLogger("stet.service")

ServiceState = Literal["loading", "ready", "draining", "engine_restarting", "failed"]


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What an operator may choose.

    max_waiting             places in the queue, beyond the engine's max_running
    default_max_new_tokens  when a request does not say, and there is room
    default_deadline_ms     likewise; None: none
    tokenizer_threads       texts tokenized at once
    inline_characters       a text up to this long is tokenized on the event loop: a thread would take longer
    """

    max_waiting: int = 256
    default_max_new_tokens: int = 256
    default_deadline_ms: int | None = None
    tokenizer_threads: int = 2
    inline_characters: int = 2048


class Service:
    """Owns the model's text side and the requests being carried out, and gives them their places. One event loop."""

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
        self._executor = ThreadPoolExecutor(self._settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self._preparation: asyncio.Task[None] | None = None
        self._text: ModelText | None = None
        self._model = ""
        self._fingerprint = ""
        # Apart from the tokenizers', so that grammars hold up nobody else.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._grammars: dict[str, str] = {}
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
        if self._supervisor.state != "ready" or self._text is None:
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
        self._preparation = asyncio.create_task(self._prepare(), name="service-preparation")

    async def _prepare(self) -> None:
        try:
            ready = await self._supervisor.wait_ready()
            loop = asyncio.get_running_loop()
            self._model = await loop.run_in_executor(self._executor, _public_name, ready.identity.model)
            self._text = await loop.run_in_executor(self._executor, ModelText.load, Path(ready.model_path))
            identity = json.dumps({**dataclasses.asdict(ready.identity), "model": self._model}, sort_keys=True)
            self._fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        except EngineFailed as error:
            self._failure = error
        except ModelTextError as error:
            self._failure = EngineFailed(str(error), usage=True)
        except Exception as error:
            logger.exception("the model's text files could not be prepared")
            self._failure = EngineFailed(f"the model's text files cannot be used: {type(error).__name__}", usage=True)

    async def ready(self) -> None:
        """Wait until requests are accepted. Raises EngineFailed, with one line for the operator, if they never will."""
        if self._preparation is None:
            raise RuntimeError("start() comes first")
        await asyncio.shield(self._preparation)
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
        if self._preparation is not None:
            self._preparation.cancel()
            await asyncio.gather(self._preparation, return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    # What is known beforehand

    @property
    def model(self) -> str:
        """What the served model is called in requests and answers; "" until it is known."""
        return self._model

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
        return self._fingerprint

    @property
    def context_length(self) -> int:
        """Tokens of one sequence, prompt and output; 0 until it is known."""
        ready = self._supervisor.ready
        return context_of(ready) if ready is not None else 0

    def info(self) -> dict[str, Any]:
        """Identity, limits, defaults and state: the body of /info. Holds no path."""
        ready = self._supervisor.ready
        known: dict[str, Any] = {"state": self.state, "version": VERSION}
        if ready is not None and self._model:
            identity = ready.identity
            known["model"] = self._model
            known["identity"] = {**dataclasses.asdict(identity), "model": self._model}
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
        if self._text is not None:
            known["chat_template"] = self._text.template is not None
            known["defaults"] = {
                **DEFAULTS,
                **self._text.generation_defaults,
                "max_new_tokens": self._settings.default_max_new_tokens,
                "deadline_ms": self._settings.default_deadline_ms,
            }
        known["engine"] = {"restarts": self._supervisor.restarts}
        return known

    def problems(self, request: GenerationRequest) -> list[Problem]:
        """What is wrong with a request that the model's limits show without tokenizing. Empty before it is loaded."""
        ready, text = self._supervisor.ready, self._text
        if ready is None or text is None:
            return []
        found = self._preparation_of(ready, text).problems(request)
        capacity = self._places.capacity(ready.max_running)
        if request.n > capacity:
            message = f"n must not exceed the {capacity} places of this server."
            found.append(Problem("n", message, request.n, f"1 to {capacity}"))
        return found

    def _preparation_of(self, ready: Ready, text: ModelText) -> Preparation:
        settings = self._settings
        return Preparation(
            ready,
            text,
            self._executor,
            self._compiler,
            settings.default_max_new_tokens,
            settings.inline_characters,
            self._grammars,
        )

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """The ids of a request's prompt. Raises Refusal."""
        if self._text is None:
            raise self._not_ready()
        if problems := self.problems(request):
            raise Refusal("invalid_request", problems)
        ready, text = self._supervisor.ready, self._text
        if ready is None:
            raise self._not_ready()
        return await self._preparation_of(ready, text).prompt(request)

    def detokenize(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Raises Refusal."""
        ids = tuple(token_ids)
        if self._text is None:
            raise self._not_ready()
        if problems := self.problems(GenerationRequest(prompt_token_ids=ids)):
            message = problems[0].message.replace("prompt_token_ids", "tokens")
            raise Refusal("invalid_request", [dataclasses.replace(problems[0], param="tokens", message=message)])
        return self._text.decode(ids, skip_special_tokens)

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
            ready, text = self._reserve(request)
            reserved = True
            job = Job(request, began, self._metrics) if trace is None else trace.job(self._metrics)
            self._jobs.add(job)
            preparation = self._preparation_of(ready, text)
            prompt_ids, params = await preparation.resolve(request)
            if job.cancelled:
                raise self._not_ready()
            deadline = self._deadline(request, ready, began)
            job.prepare(text, params, prompt_ids, self._clock())
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
                    yield Started(self._answer_id(request), self._model, params.seed)
                    prompt_logprobs = job.prompt_logprobs()
                    if prompt_logprobs is not None:
                        yield prompt_logprobs
                    if request.echo:
                        echoed = preparation.prompt_text(request, prompt_ids)
                        for index in range(request.n):
                            yield TextDelta(index, echoed, ())
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
            self._count(endpoint, outcome, job, now - began, now)
            if trace is not None:
                trace.end(self._model, outcome, job, now)

    async def dry_run(self, request: GenerationRequest, endpoint: str = "/generate") -> DryRun:
        """What a request would be: its parameters, its tokens, and how much of them is cached. Raises Refusal."""
        began = self._clock()
        outcome: str = FinishReason.CANCELLED.value
        try:
            found = await self._dry_run(request)
            outcome = "dry_run"
        except Refusal as refusal:
            outcome = refusal.code
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._count(endpoint, outcome, None, self._clock() - began, self._clock())
        return found

    async def _dry_run(self, request: GenerationRequest) -> DryRun:
        ready, text = self._ready()
        if problems := self.problems(request):
            raise Refusal("invalid_request", problems)
        preparation = self._preparation_of(ready, text)
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
        return DryRun(self._answer_id(request), self._model, parameters, tuple(prompt_ids), cached)

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
            requests = await self._check_together(requests)
        except BaseException as error:
            outcome: str = error.code if isinstance(error, Refusal) else "internal"
            if isinstance(error, asyncio.CancelledError):
                outcome = FinishReason.CANCELLED.value
            self._count(endpoint, outcome, None, self._clock() - began, self._clock())
            raise
        queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(4 * len(requests))

        async def run(position: int, request: GenerationRequest) -> None:
            try:
                async with contextlib.aclosing(self.generate(request, endpoint)) as events:
                    async for event in events:
                        await queue.put((position, event))
            except Exception as error:
                await queue.put((position, error))

        # Each takes its places and hands its tokens to the engine before it first waits, and so before any first event.
        tasks = [asyncio.create_task(run(position, request)) for position, request in enumerate(requests)]
        started = False
        ends: list[Completed] = []
        try:
            while len(ends) < len(requests):
                position, event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Completed):
                    ends.append(event)
                elif isinstance(event, Started):
                    if not started:
                        yield event
                    started = True
                else:
                    yield dataclasses.replace(event, index=position * requests[0].n + event.index)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        yield _sum(ends)

    async def _check_together(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """The requests with their prompts as tokens, once all could be carried out now. Raises Refusal."""
        ready, text = self._ready()
        preparation = self._preparation_of(ready, text)
        places = sum(request.n for request in requests)
        self._places.check(places, requests[0].tenant, ready.max_running, self._clock())
        seed = requests[0].seed if requests[0].seed is not None else secrets.randbelow(2**53)
        checked: list[GenerationRequest] = []
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
            checked.append(dataclasses.replace(request, prompt=None, prompt_token_ids=tuple(prompt), seed=seed))
        return checked

    def _ready(self) -> tuple[Ready, ModelText]:
        """What generation needs. Raises Refusal unless the state is "ready"."""
        ready, text = self._supervisor.ready, self._text
        if self.state != "ready" or ready is None or text is None:
            raise self._not_ready()
        return ready, text

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

    def _reserve(self, request: GenerationRequest) -> tuple[Ready, ModelText]:
        """Take the request's places, all or none, without a pause in which another could. Raises Refusal."""
        ready, text = self._ready()
        if problems := self.problems(request):
            raise Refusal("invalid_request", problems)
        self._places.take(request.n, request.tenant, ready.max_running, self._clock())
        return ready, text

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

    def _count(self, endpoint: str, outcome: str, job: Job | None, duration: float, now: float) -> None:
        timings = job.timings(now) if job is not None else None
        began = job is not None and job.num_tokens > 0
        self._metrics.request_finished(
            endpoint,
            outcome,
            duration=duration,
            queue=timings.queue_ms / 1e3 if timings is not None and began else None,
            prefill=timings.prefill_ms / 1e3 if timings is not None and began else None,
            decode=timings.decode_ms / 1e3 if timings is not None and began else None,
            prompt_tokens=job.prompt_tokens if job is not None else 0,
            generated_tokens=job.num_tokens if job is not None else 0,
            exemplar=job.exemplar if job is not None else None,
        )


def _public_name(model: str) -> str:
    """What a model is called in answers: its Hub id or own name, or the last part of its path; no path."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.is_dir() else model


def _sum(ends: Sequence[Completed]) -> Completed:
    """One end for several prompts: tokens added up; of the times, which ran side by side, the longest."""
    usage = Usage(
        sum(end.usage.prompt_tokens for end in ends),
        sum(end.usage.completion_tokens for end in ends),
        sum(end.usage.cached_tokens for end in ends),
    )
    times = zip(*(dataclasses.astuple(end.timings) for end in ends), strict=True)
    return Completed(ends[0].seed, usage, Timings(*map(max, times)))

"""Spans of every request, sent to an OpenTelemetry collector (OTLP over HTTP). Imported only where it is asked for.

A request is one span, a child of the caller's `traceparent` if it sent one, with a child for each phase: admission,
queue, prefill, decode, detokenize. They are made from the times that the request's Job keeps anyway, once it has
ended: nothing is done a token but to measure how long its text took. Sampling, the service's name and the exporter's
headers are set with OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, …).

Attributes hold counts, sizes and reasons; never a prompt or an output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.client import Arrival, EngineClient
from server.generation import Event, GenerationRequest
from server.job import Job
from server.metrics import Metrics
from server.version import VERSION

# A collector that does not answer must not hold up the end of the server.
_EXPORT_SECONDS = 3
# The endings that are a fault of the server.
_FAULTS = ("error", "internal", "engine_restarting")


class TracedJob(Job):
    """A Job that measures the time its text takes, and carries the trace for the metrics' exemplars."""

    def __init__(self, request: GenerationRequest, began: float, metrics: Metrics, exemplar: dict[str, str] | None):
        super().__init__(request, began, metrics)
        self.exemplar = exemplar
        self.text_seconds = 0.0
        self.text_span: tuple[float, float] | None = None

    def take(self, arrivals: list[Arrival], client: EngineClient) -> list[Event]:
        """As Job does, with a watch in the hand."""
        began = time.monotonic()
        events = super().take(arrivals, client)
        ended = time.monotonic()
        self.text_seconds += ended - began
        self.text_span = (self.text_span[0] if self.text_span is not None else began, ended)
        return events

    def phases(self) -> list[tuple[str, float, float]]:
        """The phases it went through, each with its begin and end on the service's clock."""
        found = []
        if self._submitted > self._began:
            found.append(("admission", self._began, self._submitted))
        if self._first_at is not None:
            waited = self._first.queue_seconds if self._first is not None else 0.0
            scheduled = min(self._submitted + waited, self._first_at)
            found.append(("queue", self._submitted, scheduled))
            found.append(("prefill", scheduled, self._first_at))
            found.append(("decode", self._first_at, self._last_at))
        return found


class Trace:
    """The span of one request, open until `end`."""

    def __init__(self, tracer: Tracer, request: GenerationRequest, endpoint: str, began: float) -> None:
        self._tracer = tracer
        self._request = request
        self._began = began
        # One difference of the clocks for all of its spans, so that they touch.
        self._offset = tracer.offset()
        context = tracer.context_of(request.traceparent)
        self._span = tracer.start(f"POST {endpoint}", context, self._wall(began), SpanKind.SERVER)
        self._span.set_attribute("http.route", endpoint)

    def job(self, metrics: Metrics) -> TracedJob:
        """The Job of this request."""
        context, exemplar = self._span.get_span_context(), None
        if self._span.is_recording():
            exemplar = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        return TracedJob(self._request, self._began, metrics, exemplar)

    def end(self, model: str, outcome: str, job: Job | None, now: float) -> None:
        """The request has ended: its phases become spans, and its own is closed."""
        span, request = self._span, self._request
        if not span.is_recording():
            return
        span.set_attribute("gen_ai.operation.name", "text_completion" if request.messages is None else "chat")
        span.set_attribute("gen_ai.response.model", model)
        span.set_attribute("stet.outcome", outcome)
        span.set_attribute("stet.choices", request.n)
        if request.tenant:
            span.set_attribute("stet.api_key", request.tenant)
        if outcome in _FAULTS:
            span.set_status(Status(StatusCode.ERROR, outcome))
        if isinstance(job, TracedJob):
            usage = job.usage()
            span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
            context = set_span_in_context(span)
            for name, began, ended in job.phases():
                self._tracer.start(name, context, self._wall(began)).end(self._wall(ended))
            if job.text_span is not None:
                text = self._tracer.start("detokenize", context, self._wall(job.text_span[0]))
                # The span is as long as the stream; this much of it was work.
                text.set_attribute("stet.busy_seconds", job.text_seconds)
                text.end(self._wall(job.text_span[1]))
        span.end(self._wall(now))

    def _wall(self, moment: float) -> int:
        """A moment of the service's clock in nanoseconds since 1970."""
        return self._offset + int(moment * 1e9)


class Tracer:
    """Owns the exporter and its thread. `begin` for each request, `close` at the end."""

    def __init__(
        self,
        endpoint: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        exporter: SpanExporter | None = None,
    ) -> None:
        """endpoint: the collector's URL; without a path, that of OTLP's traces is added. clock: the service's."""
        self._clock = clock
        path = "" if urlsplit(endpoint).path.strip("/") else "/v1/traces"
        exporter = exporter or OTLPSpanExporter(endpoint.rstrip("/") + path, timeout=_EXPORT_SECONDS)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "stet", "service.version": VERSION}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("stet", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, request: GenerationRequest, endpoint: str, began: float) -> Trace:
        """The span of a request that arrived at `began`."""
        return Trace(self, request, endpoint, began)

    def context_of(self, traceparent: str) -> Context:
        """The caller's context; an empty one for a header that is missing or malformed."""
        # Given an empty context: else what this thread happens to be in would be the parent.
        return self._propagator.extract({"traceparent": traceparent}, Context()) if traceparent else Context()

    def start(self, name: str, context: Context, began: int, kind: SpanKind = SpanKind.INTERNAL) -> Span:
        """A span that began so many nanoseconds after 1970."""
        return self._tracer.start_span(name, context, kind, start_time=began)

    def offset(self) -> int:
        """What a moment of the service's clock, in nanoseconds, is short of the time since 1970."""
        return time.time_ns() - int(self._clock() * 1e9)

    def close(self) -> None:
        """Send what is left. Blocks, for as long as an export may take."""
        self._provider.shutdown()

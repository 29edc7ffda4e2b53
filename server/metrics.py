"""Every Prometheus metric of the server, in one object with its own registry.

The names, types and labels are those of docs/api.md; a test compares them. Whoever sees something happen calls one
method here; nobody else touches a metric. All methods but `render` run on the event loop's thread.

The books balance: every token that an engine step computed is counted once, as prompt, generated, recomputed or
discarded, and every request ends in exactly one `outcome`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine.messages import Heartbeat, Ready, StepStats

# A small model on a fast card answers in a millisecond and a long prompt on a laptop in a minute: the first bucket of
# every latency is 0.5 ms, so that neither hides in an end bucket.
_LATENCY_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0,
)  # fmt: skip
_TOKEN_LATENCY_BUCKETS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_TOKEN_COUNT_BUCKETS = tuple(float(2**power) for power in range(18))

# The label sets are fixed: a client cannot make new series by inventing routes or methods.
ENDPOINTS = ("/generate", "/v1/completions", "/v1/chat/completions")
FINISHED = ("stop", "length", "cancelled", "deadline", "error")
REFUSED = (
    "invalid_request",
    "unauthorized",
    "forbidden",
    "model_not_found",
    "context_length_exceeded",
    "unsupported_grammar",
    "timeout",
    "too_large",
    "unsupported_media_type",
    "queue_full",
    "rate_limited",
    "internal",
    "unsupported",
    "loading",
    "draining",
    "engine_restarting",
)
_RELOADS = ("loaded", "refused")
# What was answered and generated nothing.
NOT_GENERATED = ("dry_run",)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_DISCARD_REASONS = ("stop", "abort", "pipeline")
_MEMORY_KINDS = ("weights", "kv_cache", "workspace", "graphs")


class _WithoutCreated(Collector):
    """The metrics of a registry without the `_created` series that the client library adds to each counter."""

    def __init__(self, inner: CollectorRegistry, refresh: Callable[[], None]) -> None:
        self._inner = inner
        self._refresh = refresh

    def collect(self) -> Iterator[Metric]:
        self._refresh()
        for metric in self._inner.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """Owns the registry. `clock` gives seconds and never goes back; tests pass their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        self._exposed = CollectorRegistry()
        self._exposed.register(_WithoutCreated(registry, self._refresh_age))
        self._num_blocks = 0
        self._last_step_at: float | None = None
        self._idle = True

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...] = _LATENCY_BUCKETS, labels: Iterable[str] = ()
        ) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self._build_info = gauge(
            "stet_build_info",
            "Always 1: what is served, in the labels.",
            ("version", "model", "architecture", "dtype", "quantization", "device"),
        )

        self._requests = counter(
            "stet_requests_total",
            "Requests by how they ended: a finish reason, or the code of the refusal.",
            ("endpoint", "outcome"),
        )
        self._running = gauge("stet_requests_running", "Requests that hold blocks in the engine.")
        self._waiting = gauge("stet_requests_waiting", "Requests that wait for a place in the engine.")

        self._prompt_tokens = counter("stet_prompt_tokens_total", "Prompt tokens computed for the first time.")
        self._cached_prompt_tokens = counter(
            "stet_cached_prompt_tokens_total", "Prompt tokens taken from the prefix cache instead of computed."
        )
        self._generated_tokens = counter("stet_generated_tokens_total", "Tokens delivered to their request.")
        self._recomputed_tokens = counter(
            "stet_recomputed_tokens_total", "Tokens computed again after a preemption or an engine restart."
        )

        self._first_token = histogram(
            "stet_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._inter_token = histogram(
            "stet_inter_token_latency_seconds", "Between two tokens of one request.", _TOKEN_LATENCY_BUCKETS
        )
        self._time_per_output_token = histogram(
            "stet_time_per_output_token_seconds",
            "Mean time between the tokens of one request, one observation a request of two or more tokens.",
            _TOKEN_LATENCY_BUCKETS,
        )

        self._duration = histogram("stet_request_duration_seconds", "From arrival to the terminal event.")
        self._queue = histogram("stet_request_queue_seconds", "From arrival to the first step that computed for it.")
        self._prefill = histogram("stet_request_prefill_seconds", "From the first step to the first token.")
        self._decode = histogram("stet_request_decode_seconds", "From the first token to the last.")
        self._request_prompt_tokens = histogram(
            "stet_request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_COUNT_BUCKETS
        )
        self._request_generated_tokens = histogram(
            "stet_request_generated_tokens", "Tokens delivered to a request.", _TOKEN_COUNT_BUCKETS
        )

        self._step_duration = histogram(
            "stet_engine_step_duration_seconds", "Duration of one engine step.", _TOKEN_LATENCY_BUCKETS
        )
        self._step_tokens = histogram(
            "stet_engine_step_tokens", "Tokens computed in one engine step.", _TOKEN_COUNT_BUCKETS
        )
        self._blocks = gauge("stet_kv_cache_blocks", "KV blocks by state.", ("state",))
        self._cache_usage = gauge("stet_kv_cache_usage_ratio", "Share of the KV blocks that requests hold, 0 to 1.")
        self._prefix_queried = counter(
            "stet_prefix_cache_queried_tokens_total", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = counter("stet_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache.")
        self._preemptions = counter("stet_preemptions_total", "Times a running request gave its blocks back.")
        self._restarts = counter("stet_engine_restarts_total", "Times the engine process was started again.")
        self._discarded = counter(
            "stet_discarded_tokens_total", "Tokens that were computed and not delivered, by reason.", ("reason",)
        )
        self._fallbacks = counter(
            "stet_kernel_fallback_total", "Times an operator took its slower path, by operator.", ("op",)
        )
        self._engine_up = gauge("stet_engine_up", "1 while the engine is warm and connected, else 0.")
        self._last_step_age = gauge(
            "stet_engine_last_step_age_seconds", "Time since the engine with work last finished a step; 0 when idle."
        )
        self._memory = gauge("stet_memory_bytes", "Memory of the engine by kind.", ("kind",))

        self._keys = gauge("stet_api_keys", "API keys in force.")
        self._key_reloads = counter(
            "stet_api_key_reloads_total", "Times the file of API keys had changed, by what came of it.", ("outcome",)
        )

        self._http_requests = counter(
            "stet_http_requests_total", "HTTP requests answered.", ("route", "method", "status")
        )
        self._http_duration = histogram(
            "stet_http_request_duration_seconds",
            "From a request's headers to the last byte of its answer.",
            labels=("route", "method", "status"),
        )
        # Found again without the client library's own search, which costs as much as the counting.
        self._http_series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

        # Series that exist from the start: a rate over a counter that appears with its first event misses that event.
        for endpoint in ENDPOINTS:
            for outcome in (*FINISHED, *REFUSED, *NOT_GENERATED):
                self._requests.labels(endpoint, outcome)
        for reason in _DISCARD_REASONS:
            self._discarded.labels(reason)
        for outcome in _RELOADS:
            self._key_reloads.labels(outcome)
        for kind in _MEMORY_KINDS:
            self._memory.labels(kind)
        self._set_gauges(0, 0, 0, 0, 0)

    # The engine

    def engine_ready(self, ready: Ready) -> None:
        """The engine is warm: what it serves, and its memory by kind in bytes."""
        identity = ready.identity
        self._build_info.clear()
        self._build_info.labels(
            identity.versions.get("stet", "unknown"),
            identity.model,
            identity.architecture,
            identity.dtype,
            identity.quantization,
            identity.device,
        ).set(1)
        for kind in _MEMORY_KINDS:
            self._memory.labels(kind).set(ready.memory_bytes.get(kind, 0))
        self._num_blocks = ready.num_blocks
        self._set_gauges(0, 0, ready.num_blocks, 0, 0)
        self._count_fallbacks(ready.fallbacks)
        self._engine_up.set(1)
        self._last_step_at = self._clock()
        self._idle = True

    def engine_step(self, stats: StepStats) -> None:
        """One step's counts are added, its gauges replace the last ones."""
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._cached_prompt_tokens.inc(stats.cached_prompt_tokens)
        self._recomputed_tokens.inc(stats.recomputed_tokens)
        if stats.pipeline_discarded_tokens:
            self.tokens_discarded("pipeline", stats.pipeline_discarded_tokens)
        self._prefix_queried.inc(stats.prefix_queried_tokens)
        self._prefix_hits.inc(stats.prefix_hit_tokens)
        self._preemptions.inc(stats.preemptions)
        self._count_fallbacks(stats.fallbacks)
        self._step_duration.observe(stats.duration_seconds)
        self._step_tokens.observe(stats.prompt_tokens + stats.recomputed_tokens + stats.sampled_tokens)
        self._set_gauges(
            stats.num_running, stats.num_waiting, stats.blocks_free, stats.blocks_used, stats.blocks_cached
        )
        self._last_step_at = self._clock()
        self._idle = stats.num_running == 0 and stats.num_waiting == 0

    def engine_heartbeat(self, beat: Heartbeat) -> None:
        """The gauges of an engine between steps, or in a long one."""
        self._set_gauges(beat.num_running, beat.num_waiting, beat.blocks_free, beat.blocks_used, beat.blocks_cached)
        idle = beat.phase == "idle"
        if self._idle and not idle:
            # Work has arrived: its age starts now, not when the last work ended.
            self._last_step_at = self._clock()
        self._idle = idle

    def engine_down(self) -> None:
        """The engine's process is gone or cut off. Its gauges go with it; its counters stay."""
        self._engine_up.set(0)
        self._set_gauges(0, 0, 0, 0, 0)
        self._idle = False

    def engine_restarted(self) -> None:
        """A new engine process was started in place of a lost one."""
        self._restarts.inc()

    # Requests

    def tokens_delivered(self, count: int) -> None:
        """Tokens handed to a request, whether or not their text was complete."""
        self._generated_tokens.inc(count)

    def tokens_discarded(self, reason: str, count: int) -> None:
        """Tokens computed and not delivered. reason: stop (after a stop string) or abort; pipeline is the engine's."""
        self._discarded.labels(reason).inc(count)

    def first_token(self, seconds: float, exemplar: dict[str, str] | None = None) -> None:
        """Time from a request's arrival to its first token. exemplar: labels that name its trace."""
        self._first_token.observe(seconds, exemplar)

    def inter_token(self, seconds: float, count: int = 1, exemplar: dict[str, str] | None = None) -> None:
        """`count` tokens arrived `seconds` after the ones before them: each took its share, so the sum stays true."""
        for _ in range(count):
            self._inter_token.observe(seconds / count, exemplar)

    def request_finished(
        self,
        endpoint: str,
        outcome: str,
        *,
        duration: float,
        queue: float | None,
        prefill: float | None,
        decode: float | None,
        prompt_tokens: int,
        generated_tokens: int,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """A request ended, well or badly: called exactly once for each that arrived at an endpoint that generates.

        outcome is a finish reason or the code of a refusal. Times in seconds; None for a phase it never reached.
        Refusals are counted and not timed: thousands of quick ones would hide how long answers take.
        """
        self._requests.labels(endpoint, outcome).inc()
        if outcome not in FINISHED:
            return
        self._duration.observe(duration, exemplar)
        self._request_prompt_tokens.observe(prompt_tokens)
        self._request_generated_tokens.observe(generated_tokens)
        if queue is not None:
            self._queue.observe(queue, exemplar)
        if prefill is not None:
            self._prefill.observe(prefill, exemplar)
        if decode is not None:
            self._decode.observe(decode, exemplar)
            if generated_tokens > 1:
                self._time_per_output_token.observe(decode / (generated_tokens - 1), exemplar)

    def request_refused(self, endpoint: str, outcome: str) -> None:
        """A request to an endpoint that generates was refused before anybody read what it asks for."""
        self._requests.labels(endpoint, outcome).inc()

    # API keys

    def keys_loaded(self, count: int) -> None:
        """So many keys are in force from now on."""
        self._keys.set(count)
        self._key_reloads.labels("loaded").inc()

    def keys_refused(self) -> None:
        """The file of keys has changed into one that cannot be used."""
        self._key_reloads.labels("refused").inc()

    # HTTP

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """An answer left the server. `route` is the pattern of a known route, never the path that was sent."""
        key = (route, method if method in _METHODS else "other", status)
        series = self._http_series.get(key)
        if series is None:
            labels = (*key[:2], str(status))
            series = self._http_requests.labels(*labels), self._http_duration.labels(*labels)
            self._http_series[key] = series
        count, duration = series
        count.inc()
        duration.observe(seconds)

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """All metrics as text, and its content type: Prometheus, or OpenMetrics if the Accept header asks for it."""
        encoder, content_type = choose_encoder(accept or "")
        return encoder(self._exposed), content_type

    def _set_gauges(self, running: int, waiting: int, free: int, used: int, cached: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._blocks.labels("free").set(free)
        self._blocks.labels("used").set(used)
        self._blocks.labels("cached").set(cached)
        self._cache_usage.set(used / self._num_blocks if self._num_blocks else 0.0)

    def _count_fallbacks(self, fallbacks: Mapping[str, int]) -> None:
        for op, count in fallbacks.items():
            self._fallbacks.labels(op).inc(count)

    def _refresh_age(self) -> None:
        idle = self._idle or self._last_step_at is None
        self._last_step_age.set(0.0 if idle else self._clock() - (self._last_step_at or 0.0))

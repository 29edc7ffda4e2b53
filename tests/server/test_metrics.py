"""The metrics: their names and labels are the page's, their text is Prometheus', their books balance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from server.engine.identity import Identity
from server.engine.messages import Heartbeat, Ready, StepStats
from server.engine.request import FinishReason
from server.generation import ErrorCode
from server.http.errors import STATUS
from server.metrics import FINISHED, REFUSED, Metrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ready() -> Ready:
    identity = Identity("tiny", "Llama", "0", 1, "bfloat16", "bfloat16", "none", "cpu", "AVX512", 2, {"stet": "9.9"})
    return Ready(identity, 64, 100, 16, 8, [2], 4, {"weights": 1000, "kv_cache": 2000}, "/", {})


def stats(**changes: float) -> StepStats:
    values: dict[str, float] = {
        "step_id": 1,
        "duration_seconds": 0.004,
        "prompt_tokens": 10,
        "recomputed_tokens": 3,
        "sampled_tokens": 5,
        "pipeline_discarded_tokens": 1,
        "cached_prompt_tokens": 16,
        "prefix_queried_tokens": 32,
        "prefix_hit_tokens": 16,
        "preemptions": 1,
        "num_running": 2,
        "num_waiting": 1,
        "blocks_free": 70,
        "blocks_used": 20,
        "blocks_cached": 10,
    }
    return StepStats(**(values | changes))  # type: ignore[arg-type]


def finish(metrics: Metrics, outcome: str, generated: int = 3) -> None:
    metrics.request_finished(
        "/generate",
        outcome,
        duration=1.0,
        queue=0.1,
        prefill=0.2,
        decode=0.6,
        prompt_tokens=5,
        generated_tokens=generated,
    )


def exercised(clock: Clock | None = None) -> Metrics:
    metrics = Metrics(clock or Clock())
    metrics.engine_ready(ready())
    metrics.engine_step(stats())
    metrics.engine_heartbeat(Heartbeat("step", 1, 0.1, 0.0, 2, 1, 70, 20, 10))
    metrics.engine_restarted()
    metrics.tokens_delivered(4)
    metrics.tokens_discarded("stop", 2)
    metrics.first_token(0.05)
    metrics.inter_token(0.01)
    metrics.inter_token(0.03, 3)
    finish(metrics, "length")
    metrics.http_request("/generate", "POST", 200, 0.5)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    text = metrics.render(None)[0].decode()
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in parse_prometheus(text)
        for sample in family.samples
    }


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> type and labels, from the page's table."""
    rows = re.findall(r"^\| (`stet_.*?) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for names, kinds in rows:
        kind, _, labels = kinds.partition(": ")
        labels = labels.partition(" = ")[0]
        for name in re.findall(r"stet_\w+", names):
            found[name] = (kind.strip(), frozenset(re.findall(r"\w+", labels)))
    return found


def test_names_types_and_labels_are_the_pages() -> None:
    metrics = exercised()
    metrics._fallbacks.labels("attention").inc()
    families = {}
    for family in parse_prometheus(metrics.render(None)[0].decode()):
        labels = {key for sample in family.samples for key in sample.labels} - {"le"}
        name = family.name + "_total" if family.type == "counter" else family.name
        families[name] = (family.type, frozenset(labels))
    assert families == documented()


def test_slower_paths_are_counted_from_the_start_on() -> None:
    metrics = Metrics(Clock())
    metrics.engine_ready(msgspec.structs.replace(ready(), fallbacks={"linear": 2}))
    metrics.engine_step(stats(fallbacks={"compile": 1, "linear": 1}))  # type: ignore[arg-type]
    metrics.engine_step(stats())
    assert samples(metrics)["stet_kernel_fallback_total{op=linear}"] == 3
    assert samples(metrics)["stet_kernel_fallback_total{op=compile}"] == 1


def test_every_outcome_exists_from_the_start() -> None:
    assert set(FINISHED) == {reason.value for reason in FinishReason}
    assert set(get_args(ErrorCode)) <= {*REFUSED, *FINISHED}
    assert set(REFUSED) <= set(STATUS)
    for outcome in (*FINISHED, *REFUSED):
        assert samples(Metrics())[f"stet_requests_total{{endpoint=/generate}}{{outcome={outcome}}}"] == 0


def test_prometheus_text() -> None:
    body, content_type = exercised().render("*/*")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"_created" not in body
    lines = body.decode().splitlines()
    for line in lines:
        assert re.fullmatch(
            r"# (HELP|TYPE) stet_\w+ .+|stet_\w+(\{.*\})? [0-9.e+-]+|stet_\w+_bucket\{.*\} [0-9.]+", line
        )
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_openmetrics_when_asked_for() -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    body, content_type = exercised().render(accept)
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert {family.name for family in parse_openmetrics(body.decode())} >= {"stet_requests", "stet_engine_up"}


def test_base_units_and_first_buckets() -> None:
    for name, (kind, _) in documented().items():
        assert not re.search(r"_(ms|milliseconds|minutes|kib|mib|gib|percent)(_|$)", name)
        assert name.endswith("_total") == (kind == "counter")
    text = exercised().render(None)[0].decode()
    for name in re.findall(r"# TYPE (\w+_seconds) histogram", text):
        first = re.search(rf"^{name}_bucket{{.*le=\"([^\"]+)\"", text, re.MULTILINE)
        assert first is not None
        assert float(first[1]) == 0.0005


def test_histograms_are_cumulative() -> None:
    for family in parse_prometheus(exercised().render(None)[0].decode()):
        if family.type == "histogram":
            counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            assert counts == sorted(counts)


def test_every_token_is_counted_once() -> None:
    metrics = Metrics()
    metrics.engine_ready(ready())
    sampled = recomputed = prompt = 0
    for step in range(5):
        metrics.engine_step(
            stats(prompt_tokens=step, sampled_tokens=7, recomputed_tokens=2, pipeline_discarded_tokens=1)
        )
        prompt, recomputed, sampled = prompt + step, recomputed + 2, sampled + 7
    # Of 35 sampled tokens 5 were discarded in the pipeline; the service delivers or discards the others.
    metrics.tokens_delivered(25)
    metrics.tokens_discarded("stop", 3)
    metrics.tokens_discarded("abort", 2)
    seen = samples(metrics)
    counted = (
        seen["stet_prompt_tokens_total"]
        + seen["stet_recomputed_tokens_total"]
        + seen["stet_generated_tokens_total"]
        + sum(value for name, value in seen.items() if name.startswith("stet_discarded_tokens_total"))
    )
    assert counted == prompt + recomputed + sampled == seen["stet_engine_step_tokens_sum"]


def test_a_request_has_one_outcome_and_refusals_are_not_timed() -> None:
    metrics = Metrics()
    for outcome in (*FINISHED, *REFUSED):
        finish(metrics, outcome)
    seen = samples(metrics)
    total = sum(value for name, value in seen.items() if name.startswith("stet_requests_total"))
    assert total == len(FINISHED) + len(REFUSED)
    assert seen["stet_request_duration_seconds_count"] == len(FINISHED)
    assert seen["stet_request_queue_seconds_count"] == len(FINISHED)


def test_time_per_output_token_needs_two() -> None:
    metrics = Metrics()
    finish(metrics, "length", generated=1)
    finish(metrics, "length", generated=3)
    seen = samples(metrics)
    assert seen["stet_time_per_output_token_seconds_count"] == 1
    assert seen["stet_time_per_output_token_seconds_sum"] == pytest.approx(0.3)


def test_inter_token_shares_keep_the_sum() -> None:
    seen = samples(exercised())
    assert seen["stet_inter_token_latency_seconds_count"] == 4
    assert seen["stet_inter_token_latency_seconds_sum"] == pytest.approx(0.04)


def test_gauges_follow_the_engine() -> None:
    metrics = exercised()
    seen = samples(metrics)
    assert seen["stet_kv_cache_usage_ratio"] == pytest.approx(0.2)
    assert seen["stet_engine_up"] == 1
    assert seen["stet_memory_bytes{kind=weights}"] == 1000
    assert seen["stet_memory_bytes{kind=graphs}"] == 0
    metrics.engine_down()
    seen = samples(metrics)
    assert seen["stet_engine_up"] == seen["stet_requests_running"] == seen["stet_kv_cache_usage_ratio"] == 0
    assert seen["stet_prompt_tokens_total"] == 10
    metrics.engine_ready(ready())
    seen = samples(metrics)
    assert seen["stet_engine_up"] == 1
    assert sum(name.startswith("stet_build_info") for name in seen) == 1


def test_last_step_age() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    assert samples(metrics)["stet_engine_last_step_age_seconds"] == 0
    metrics.engine_ready(ready())
    clock.now += 50
    assert samples(metrics)["stet_engine_last_step_age_seconds"] == 0, "an idle engine has no age"
    metrics.engine_heartbeat(Heartbeat("step", 1, 0.0, 0.0, 1, 0, 90, 10, 0))
    clock.now += 2
    assert samples(metrics)["stet_engine_last_step_age_seconds"] == 2, "counted from when work arrived"
    metrics.engine_step(stats())
    clock.now += 5
    assert samples(metrics)["stet_engine_last_step_age_seconds"] == 5
    metrics.engine_step(stats(num_running=0, num_waiting=0))
    clock.now += 5
    assert samples(metrics)["stet_engine_last_step_age_seconds"] == 0


def test_a_client_cannot_make_series() -> None:
    metrics = Metrics()
    before = len(samples(metrics))
    for number in range(50):
        metrics.http_request("other", f"METHOD{number}", 404, 0.1)
    names = [name for name in samples(metrics) if name.startswith("stet_http_requests_total")]
    assert len(names) == 1
    assert len(samples(metrics)) - before < 40


def test_two_objects_share_nothing() -> None:
    first, second = exercised(), Metrics()
    assert samples(first)["stet_generated_tokens_total"] == 4
    assert samples(second)["stet_generated_tokens_total"] == 0

"""Traces: a real server sends them to a real collector, over a socket."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from loadtests.processes import free_port
from tests.server.http.launch import launched
from tests.server.http.wire import wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
MARKER = "Xyzzy"


class Collector:
    """Takes what is posted to /v1/traces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/traces":
                    collector.bodies.append(body)
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        """All spans that have arrived."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def trace(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by name, once its root is there: it is sent last."""
        wait_for(lambda: any(span.name.startswith("POST") for span in self._of(trace_id)), 10)
        return {span.name: span for span in self._of(trace_id)}

    def _of(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans() if span.trace_id.hex() == trace_id]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def traceparent(number: int, flags: str = "01") -> dict[str, str]:
    """The header of the caller's trace number so and so."""
    return {"traceparent": f"00-{TRACE[:-2]}{number:02x}-{PARENT}-{flags}"}


def test_a_request_is_a_span_with_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with (
        collecting() as collector,
        launched(tmp_path, "--otlp-endpoint", collector.url, step_seconds=0.01, mode="echo") as server,
    ):

        def post(path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
            return server.client.post(server.url + path, json=body, headers=headers)

        before = time.time_ns()
        body = {"prompt": f"{MARKER} once", "max_new_tokens": 12, "ignore_eos": True, "stream": True}
        assert post("/generate", body, traceparent(1)).text.endswith("[DONE]\n\n")
        spans = collector.trace(TRACE[:-2] + "01")
        root = spans.pop("POST /generate")
        assert (root.parent_span_id.hex(), root.kind) == (PARENT, Span.SPAN_KIND_SERVER)
        assert before < root.start_time_unix_nano < root.end_time_unix_nano < time.time_ns()
        found = attributes(root)
        assert (found["http.route"], found["stet.outcome"]) == ("/generate", "length")
        assert found["gen_ai.usage.output_tokens"] == 12
        assert found["gen_ai.usage.input_tokens"] > 0
        assert set(spans) == {"admission", "queue", "prefill", "decode", "detokenize"}
        for span in spans.values():
            assert span.parent_span_id == root.span_id
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
        phases = [spans[name] for name in ("admission", "queue", "prefill", "decode")]
        assert phases[0].start_time_unix_nano == root.start_time_unix_nano
        for earlier, later in pairwise(phases):
            assert earlier.end_time_unix_nano == later.start_time_unix_nano
        # Eleven steps of 10 ms each.
        assert phases[-1].end_time_unix_nano - phases[-1].start_time_unix_nano > 100_000_000
        text = spans["detokenize"]
        span_seconds = (text.end_time_unix_nano - text.start_time_unix_nano) / 1e9
        assert 0 < attributes(text)["stet.busy_seconds"] < span_seconds

        # OpenAI's dialect; a request that is refused; a trace that is not sampled.
        chat = {"messages": [{"role": "user", "content": MARKER}], "max_tokens": 2}
        assert post("/v1/chat/completions", chat, traceparent(2)).status_code == 200
        assert (
            attributes(collector.trace(TRACE[:-2] + "02")["POST /v1/chat/completions"])["gen_ai.operation.name"]
            == "chat"
        )
        assert post("/generate", {"prompt": MARKER * 5000}, traceparent(3)).status_code == 400
        (refused,) = collector.trace(TRACE[:-2] + "03").values()
        assert attributes(refused)["stet.outcome"] == "context_length_exceeded"
        assert post("/generate", {"prompt": "x", "max_new_tokens": 2}, traceparent(4, flags="00")).status_code == 200

        # Exemplars lead from the histograms to the traces.
        page = server.client.get(server.url + "/metrics", headers=OPENMETRICS).text
        for name in ("time_to_first_token", "inter_token_latency", "request_decode", "request_queue"):
            assert re.search(rf'^stet_{name}_seconds_bucket.* # {{.*trace_id="{TRACE[:-2]}0\d"', page, re.MULTILINE), (
                name
            )
        assert TRACE[:-2] + "04" not in page
        assert TRACE[:-2] not in server.get("/metrics").text

        # A header that is none begins a trace.
        before_malformed = len(collector.spans())
        assert post("/generate", {"prompt": "x", "max_new_tokens": 1}, {"traceparent": "00-zz"}).status_code == 200
        wait_for(lambda: len(collector.spans()) > before_malformed, 10)

        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not any(span.trace_id.hex().endswith("04") for span in collector.spans())
        assert MARKER.encode() not in b"".join(collector.bodies)


def test_a_collector_that_is_gone_holds_nobody_up(tmp_path: Path) -> None:
    with launched(tmp_path, "--otlp-endpoint", f"http://127.0.0.1:{free_port()}") as server:
        assert server.generate(prompt="x", max_new_tokens=2).status_code == 200
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - began < 10


def test_without_it_nothing_is_imported() -> None:
    code = (
        "import sys, server.cli, server.http.app, server.http.serving, server.service, server.metrics, server.job\n"
        # The web framework imports the API of OpenTelemetry by itself; what makes and sends spans is another part.
        "parts = ('opentelemetry.sdk', 'opentelemetry.exporter', 'server.tracing')\n"
        "print([name for name in sys.modules if name.startswith(parts)])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_it_needs_is_said_in_a_line() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from server.cli import main; sys.exit(main(['serve', '--otlp-endpoint', 'http://127.0.0.1:4318']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "install Stet with [tracing]" in done.stderr
    assert done.stderr.count("\n") == 1

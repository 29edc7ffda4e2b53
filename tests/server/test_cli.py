"""The command line: start, what a person sees of it, and every way to end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.processes import ROOT
from server.cli import main
from server.keys import create_key
from server.version import VERSION
from tests.server.harness import command as fake_engine
from tests.server.harness import model_folder
from tests.server.http.launch import ENTRY, VOCABULARY, Launched, launched
from tests.server.http.wire import Connection, post, wait_for


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"stet {VERSION}\n"


@pytest.mark.parametrize("arguments", [[], ["launch"], ["serve", "--prot", "1"], ["vers"], ["serve", "a", "b"]])
def test_usage_errors_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("stet")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "x"], "--port: 'x' is not an integer from 0 to 65535"),
        (["--host", "0.0.0.0"], "can be reached by other machines"),
        (["--host", "::"], "--insecure"),
        (["--host", "no.such.host.invalid"], "there is no such address"),
        (["--api-keys", "/no/such/file"], "--api-keys /no/such/file: the file of API keys cannot be read"),
        (["--host", "0.0.0.0", "--api-keys", "/dev/null"], "has no [[key]] table"),
        (["--host", "192.0.2.1", "--insecure"], "choose another with --port"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1 port {port}: address already in use" in error
    assert error.count("\n") == 1


def test_the_start_imports_little_before_the_engine_runs() -> None:
    code = (
        "import sys, server.cli, server.serve_command\n"
        "print(sorted({'fastapi', 'pydantic', 'uvicorn', 'prometheus_client', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_http_process_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, server.cli, server.serve_command, server.http.app, server.http.serving, server.service\n"
        "import server.metrics, server.logs\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_while_it_loads(tmp_path: Path) -> None:
    with launched(tmp_path, ready=False, load_seconds=2.0) as server:
        server.wait_for("/livez", 200, 10)
        answer = server.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        refused = server.generate(prompt="x")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "loading"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.generate(prompt="x", temperature=9).status_code == 400
        assert server.get("/info").status_code == 200
        assert server.metric("stet_engine_up") == 0
        server.wait_for("/readyz", 200)
        assert server.generate(prompt="x", max_new_tokens=2).status_code == 200


def test_ready_is_a_line_or_a_summary(tmp_path: Path) -> None:
    with launched(tmp_path, "--log-format", "json") as server:
        wait_for(lambda: '"ready"' in server.stderr)
        line = json.loads(server.stderr.splitlines()[0])
        assert line["event"] == "ready"
        assert line["url"] == server.url
        assert line["startup_seconds"] < 30
    with launched(tmp_path, "--log-format", "text") as server:
        wait_for(lambda: "curl" in server.stderr)
        text = server.stderr
        assert f"serves fake on {server.url}" in text
        for word in ("model", "dtype", "quantization", "device", "context", "KV cache", "memory", "started in"):
            assert re.search(rf"^  {word} ", text, re.MULTILINE)
        assert f"curl {server.url}/generate -H 'Content-Type: application/json'" in text


@pytest.mark.parametrize(("usage", "code"), [(True, 2), (False, 1)])
def test_an_engine_that_cannot_load(tmp_path: Path, usage: bool, code: int) -> None:
    with launched(tmp_path, ready=False, fail="no such model: fake", fail_usage=usage) as server:
        assert server.wait(20) == code
        assert "no such model: fake" in server.stderr
        assert "Traceback" not in server.stderr
        assert server.stderr.splitlines()[-1].startswith("stet: ")


@pytest.mark.parametrize(
    ("number", "pause"), [(signal.SIGINT, 0.0), (signal.SIGINT, 0.15), (signal.SIGINT, 1.0), (signal.SIGTERM, 0.1)]
)
def test_a_signal_while_it_loads_ends_it_quietly(tmp_path: Path, number: int, pause: float) -> None:
    with launched(tmp_path, ready=False, load_seconds=30.0) as server:

        def listens() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", server.port)) == 0

        wait_for(listens, 10)
        time.sleep(pause)
        began = time.monotonic()
        server.signal_group(number)
        assert server.wait(10) == 0
        assert time.monotonic() - began < 4
        assert "Traceback" not in server.stderr


class Stream:
    """A streamed request in a thread; its lines as they come."""

    def __init__(self, server: Launched, **body: Any) -> None:
        self.lines: list[str] = []
        self._server = server
        self._body = {"stream": True, **body}
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        url = self._server.url + "/generate"
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", url, json=self._body, timeout=30) as answer,
        ):
            for line in answer.iter_lines():
                self.lines.append(line)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in list(self.lines) if line.startswith("data: {")]


def test_sigterm_lets_a_stream_finish(tmp_path: Path) -> None:
    with launched(tmp_path, step_seconds=0.03) as server:
        stream = Stream(server, prompt="x", max_new_tokens=100)
        wait_for(lambda: len(stream.lines) > 3)
        server.signal(signal.SIGTERM)
        server.wait_for("/readyz", 503, 5)
        assert server.get("/readyz").json() == {"status": "draining"}
        assert server.get("/livez").status_code == 200
        refused = server.generate(prompt="x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        stream.thread.join(20)
        assert stream.lines[-2] == "data: [DONE]"
        assert [event["finish_reason"] for event in stream.events() if "finish_reason" in event] == ["length"]
        assert server.wait() == 0
        assert "Traceback" not in server.stderr


def test_sigterm_ends_what_takes_too_long(tmp_path: Path) -> None:
    with launched(tmp_path, "--drain-timeout", "0.4", step_seconds=0.05) as server:
        stream = Stream(server, prompt="x", max_new_tokens=2000)
        answers: list[httpx.Response] = []
        other = threading.Thread(target=lambda: answers.append(server.generate(prompt="y", max_new_tokens=2000)))
        other.start()
        wait_for(lambda: len(stream.lines) > 3)
        wait_for(lambda: server.metric("stet_requests_running") == 2)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - began < 5
        stream.thread.join(5)
        other.join(5)
        assert [event["finish_reason"] for event in stream.events() if "finish_reason" in event] == ["cancelled"]
        assert stream.lines[-2] == "data: [DONE]"
        output = answers[0].json()["outputs"][0]
        assert (answers[0].status_code, output["finish_reason"]) == (200, "cancelled")
        assert output["text"]


def test_sigint_drains_too(tmp_path: Path) -> None:
    with launched(tmp_path) as server:
        server.generate(prompt="x", max_new_tokens=2)
        server.signal_group(signal.SIGINT)
        assert server.wait() == 0
        assert "Traceback" not in server.stderr


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, step_seconds=0.05) as server:
        stream = Stream(server, prompt="x", max_new_tokens=2000)
        wait_for(lambda: len(stream.lines) > 3)
        server.signal(signal.SIGTERM)
        server.wait_for("/readyz", 503, 5)
        began = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait(5) == 128 + signal.SIGINT
        assert time.monotonic() - began < 1


def test_log_lines_are_json_and_hold_no_prompt(tmp_path: Path) -> None:
    marker = "Xyzzy"
    with launched(tmp_path, "--log-format", "json", mode="echo") as server:
        answer = server.generate(prompt=marker, cache_salt=marker, ignore_eos=True, max_new_tokens=12)
        assert marker in answer.text
        server.generate(messages=[{"role": "user", "content": marker}], stream=True, max_new_tokens=5)
        server.generate(**{marker: 1})
        server.generate(prompt=marker, temperature=marker)
        server.generate(prompt=[marker])
        server.generate(prompt=marker * 5000)
        server.generate(prompt="x", request_id='a\n{"event": "forged"}')
        server.generate(prompt="x", max_new_tokens=1, request_id="mine")
        httpx.get(f"{server.url}/{marker}", headers={"user-agent": marker, "authorization": f"Bearer {marker}"})
        with Connection(server.port) as connection:
            connection.send(post(f'{{"prompt": "{marker}'.encode()))
            assert connection.answer().status == 400
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        lines = [json.loads(line) for line in server.stderr.splitlines()]
        assert marker not in server.stderr
        assert "forged" not in server.stderr
        requests = [line for line in lines if line["event"] == "request"]
        # In any order: a stream's line is written when its last bytes are sent, while the next request may be answered.
        assert sorted(line["status"] for line in requests) == sorted([200, 200, 200, 404, *[400] * 6])
        for line in requests:
            assert set(line) >= {"time", "level", "request", "method", "route", "status", "ms"}
        assert requests[0]["finish_reasons"] == ["length"]
        assert requests[0]["prompt_tokens"] > 0
        named = sorted(line["params"] for line in requests if line.get("params"))
        assert named == [["prompt"], ["prompt"], ["request_id"], ["temperature"]]
        assert "context_length_exceeded" in [line.get("outcome") for line in requests]
        assert "mine" in [line.get("id") for line in requests]


def test_with_keys_other_machines_may_come(tmp_path: Path) -> None:
    """An address that they can reach, a key that is made while the server runs, and a file that breaks."""
    path = tmp_path / "keys.toml"
    first = create_key(path, "first", ["infer"], {})
    flags = ("--host", "0.0.0.0", "--api-keys", str(path), "--log-format", "json", "--deadline-ms", "60000")
    with launched(tmp_path, *flags) as server:

        def status(key: str, route: str = "/info") -> int:
            return server.client.get(server.url + route, headers={"Authorization": f"Bearer {key}"}).status_code

        assert server.get("/info").status_code == 401
        assert server.get("/docs").status_code == 401
        assert (status(first), status(first, "/metrics"), status(first, "/docs")) == (200, 403, 404)
        info = server.client.get(server.url + "/info", headers={"Authorization": f"Bearer {first}"}).json()
        assert info["defaults"]["deadline_ms"] == 60000
        second = create_key(path, "second", ["admin"], {})
        wait_for(lambda: status(second) == 200)
        path.write_text("broken")
        wait_for(lambda: "the old ones stay" in server.stderr)
        assert status(second, "/metrics") == 200
        text = server.client.get(server.url + "/metrics", headers={"Authorization": f"Bearer {second}"}).text
        assert 'stet_api_key_reloads_total{outcome="refused"} 1.0' in text
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    for line in server.stderr.splitlines():
        fields = json.loads(line)
        assert fields.get("key", "second") in ("first", "second")
    assert first not in server.stderr
    assert second not in server.stderr


def run_on_a_terminal(**engine: Any) -> str:
    """What a person sees of a start: `stet serve` with a terminal as its standard error, until it is ready."""
    command = [sys.executable, "-c", ENTRY, json.dumps(fake_engine(**engine)), "serve", "--port", "0"]
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True)
    os.close(theirs)
    seen = b""
    try:
        while b"curl" not in seen and select.select([ours], [], [], 20)[0]:
            seen += os.read(ours, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return seen.decode()


def test_a_terminal_shows_the_progress_and_then_the_summary(tmp_path: Path) -> None:
    options = {"model_path": str(model_folder(tmp_path / "model")), "vocab_size": VOCABULARY, "load_seconds": 0.5}
    seen = run_on_a_terminal(**options)
    before, _, after = seen.partition("Stet 0")
    assert "\r\x1b[Kstarting the engine" in before
    assert "\n" not in before
    assert "serves fake on http://127.0.0.1:" in after


def test_where_there_is_no_terminal_a_long_start_is_logged(tmp_path: Path) -> None:
    often = "import json, sys, server.announcement as shown\nshown._PROGRESS_LOG_SECONDS = 0.1"
    entry = ENTRY.replace("import json, sys", often)
    command = [sys.executable, "-c", entry, json.dumps(fake_engine(load_seconds=30.0)), "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--log-format", "json"], stderr=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    try:
        assert process.stderr is not None
        lines = [json.loads(process.stderr.readline()) for _ in range(2)]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert [line["event"] for line in lines] == ["starting", "starting"]


def test_the_summary_says_how_to_call_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    key = create_key(keys, "me", ["infer"], {})
    with launched(tmp_path, "--log-format", "text", "--api-keys", str(keys)) as server:
        wait_for(lambda: "OpenAI" in server.stderr)
        shown = re.search(r"curl (?:.|\n)*?}'", server.stderr)
        assert shown is not None
        done = subprocess.run(["sh", "-c", f"KEY={key}; {shown[0]}"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["usage"]["completion_tokens"] == 60
        name = re.search(r"base_url (\S+), model (\S+);", server.stderr)
        assert name is not None
        headers = {"authorization": f"Bearer {key}"}
        assert server.client.get(f"{name[1]}/models/{name[2]}", headers=headers).status_code == 200

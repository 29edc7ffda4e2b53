"""One real server, started as the image starts it, under load; and a real Prometheus that scrapes it with its rules."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.processes import ROOT, RunningServer, free_port, spawned
from server.keys import create_key
from tests.deploy import files

# Mounts, capabilities and privileges as docker-compose.yml sets them: the file system read-only but for two folders.
JAIL = (
    'for folder in "$0"/cache "$0"/tmp; do mount --bind "$folder" "$folder"; done; mount -o remount,ro,bind / && '
    "exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all "
    '"$@"'
)


def program(name: str) -> str:
    """The path of a program. Skips the test where it is missing, and fails where CI should have installed it."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is missing: apt-get install prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@dataclass(frozen=True)
class Running:
    """The server, its keys, and whether it is locked in."""

    server: RunningServer
    folder: Path
    infer: str
    metrics: str
    jailed: bool

    def get(self, path: str, key: str, **headers: str) -> httpx.Response:
        sent = {"authorization": f"Bearer {key}", **headers}
        return httpx.get(self.server.url + path, headers=sent, trust_env=False)

    def generate(self, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.infer}"}
        return httpx.post(f"{self.server.url}/generate", json=body, headers=headers, timeout=60, trust_env=False)


def can_be_jailed(folder: Path) -> bool:
    """Whether this user may make mounts of its own."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    tried = subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", JAIL, str(folder), "true"])
    return tried.returncode == 0


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`stet serve` with the image's variables and compose's, on a free port, locked in where that is possible."""
    folder = tmp_path_factory.mktemp("deploy")
    for name in ("cache", "tmp"):
        (folder / name).mkdir()
    keys = folder / "keys.toml"
    infer, metrics = create_key(keys, "me", ["infer"], {}), create_key(keys, "prometheus", ["metrics"], {})
    (folder / "prometheus_key").write_text(metrics)
    variables = {
        name: value.replace("/cache", str(folder / "cache"))
        for name, value in files.image_environment("cpu").items()
        if name != "PATH"
    }
    (entry,) = files.last("cpu", "ENTRYPOINT")
    assert entry == "stet", "the command below stands for this one"
    command = [sys.executable, "-m", "server.cli", *files.last("cpu", "CMD")]
    jailed = can_be_jailed(folder)
    if jailed:
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", JAIL, str(folder), *command]

    def on_port(port: int) -> list[str]:
        assignments = {**variables, "STET_PORT": str(port), "STET_API_KEYS": str(keys), "TMPDIR": str(folder / "tmp")}
        return ["env", *(f"{name}={value}" for name, value in assignments.items()), *command]

    with spawned(on_port, log=folder / "log") as server:
        server.wait_ready()
        yield Running(server, folder, infer, metrics, jailed)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def values(self, expression: str) -> list[float]:
        """The samples of an expression, now."""
        return [float(each["value"][1]) for each in self.ask("query", query=expression)["result"]]

    def numbers(self, expression: str, seconds: float = 15.0) -> list[float]:
        """The samples of an expression once there are some that are finite; none if there are none after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = [value for value in self.values(expression) if math.isfinite(value)]
            if found:
                return found
            time.sleep(0.2)
        return []


def local_config(folder: Path, target: str) -> str:
    """deploy/prometheus/prometheus.yml for this machine: another target, paths of its own, every second."""
    text = (files.DEPLOY / "prometheus" / "prometheus.yml").read_text()
    changes = {
        '"server:8000"': f'"{target}"',
        "/run/secrets/prometheus_key": str(folder / "prometheus_key"),
        "- rules/*.yml": f"- {files.DEPLOY}/prometheus/rules/*.yml",
        "scrape_interval: 15s": "scrape_interval: 1s",
        "evaluation_interval: 15s": "evaluation_interval: 1s",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


class Load:
    """Requests of several kinds until it is told to end: streams, repeated prompts, clients that leave, mistakes."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(3)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def _work(self, number: int) -> None:
        tale = "Once upon a time there was a fox who had lost her kite in the wind. " * 8
        url, headers = f"{self._running.server.url}/generate", {"authorization": f"Bearer {self._running.infer}"}
        while not self._ended.is_set():
            self._running.generate(prompt=f"{tale}{number}", max_new_tokens=24, ignore_eos=True)
            body = {"prompt": tale, "max_new_tokens": 200, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", url, json=body, headers=headers, timeout=60, trust_env=False) as answer:
                for count, _ in enumerate(answer.iter_lines()):
                    if count > 20:
                        break  # and leaves
            self._running.generate(prompt="A fox", stop=["e"], max_new_tokens=8)
            self._running.generate(prompt="A fox", temperature=9)


@pytest.fixture(scope="package")
def prometheus(running: Running) -> Iterator[Prometheus]:
    """Debian's Prometheus with the configuration, rules and flags of compose, and the server under load."""
    path = program("prometheus")
    folder = running.folder
    config = folder / "prometheus.yml"
    config.write_text(local_config(folder, f"{running.server.host}:{running.server.port}"))
    port = free_port()
    changes = {"/etc/prometheus/prometheus.yml": str(config), "=/prometheus": f"={folder / 'tsdb'}"}
    flags: list[str] = files.compose()["services"]["prometheus"]["command"]
    for old, new in changes.items():
        assert sum(old in flag for flag in flags) == 1
        flags = [flag.replace(old, new) for flag in flags]
    command = [path, *flags, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log, Load(running):
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            _wait_for_rules(found, process, folder / "prometheus.log")
            yield found
        finally:
            process.kill()
            process.wait()


def _wait_for_rules(prometheus: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until some scrapes are there and every rule has been evaluated over them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"Prometheus ended: {log.read_text()}")
        try:
            if prometheus.values("stet:error_ratio:rate3d"):
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"Prometheus has no data after 30 s: {log.read_text()}")

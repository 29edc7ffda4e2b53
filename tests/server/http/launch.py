"""Starts `stet serve` as a process of its own, over a fake engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests.processes import ROOT, free_port
from tests.server.harness import command, model_folder

VOCABULARY = 362
ENTRY = """
import json, sys
from server.cli import main
sys.exit(main(sys.argv[2:], engine_command=json.loads(sys.argv[1])))
"""


@dataclass
class Launched:
    """A server process. Its standard error goes to a file."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30, trust_env=False, verify=False))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        return self.log.read_text()

    def get(self, path: str) -> httpx.Response:
        return self.client.get(self.url + path)

    def generate(self, **body: Any) -> httpx.Response:
        return self.client.post(self.url + "/generate", json=body)

    def metric(self, name: str) -> float:
        """The value of one sample, as it is written in /metrics."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def wait_for(self, path: str, status: int, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"exited with {self.process.returncode}: {self.stderr}")
            with contextlib.suppress(httpx.TransportError):
                if self.get(path).status_code == status:
                    return
            time.sleep(0.02)
        raise TimeoutError(f"{path} is not {status}: {self.stderr}")

    def signal(self, number: int) -> None:
        """To the server's process alone, as `kill` and an init system do."""
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """To the engine's process as well, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self, seconds: float = 15.0) -> int:
        return self.process.wait(seconds)


@contextlib.contextmanager
def launched(folder: Path, *flags: str, ready: bool = True, **engine: Any) -> Iterator[Launched]:
    """`stet serve FLAGS` on a free port, its fake engine with these options; killed at the end."""
    engine.setdefault("model_path", str(model_folder(folder / "model")))
    engine.setdefault("vocab_size", VOCABULARY)
    port = free_port()
    log = folder / f"log-{port}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STET_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, json.dumps(command(**engine)), "serve", "--port", str(port), *flags],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Launched(process, port, log)
    try:
        if ready:
            server.wait_for("/readyz", 200)
        yield server
    finally:
        server.client.close()
        process.send_signal(signal.SIGKILL)
        process.wait()

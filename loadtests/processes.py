"""Starts real servers for measurements and tests: a free port, a wait for readiness, a clean end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server process and where it listens. started: time.perf_counter() just before it was spawned. ready_path: what
    answers 200 once it is ready."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    started: float
    ready_path: str = "/readyz"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def get(self, path: str, timeout: float = 5.0) -> tuple[int, bytes]:
        """Status and body of one GET on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def wait_ready(self, timeout: float = 60.0) -> float:
        """Seconds from the spawn until `ready_path` answers 200. Raises TimeoutError, or RuntimeError if it exits."""
        while time.perf_counter() - self.started < timeout:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode} before it was ready")
            try:
                status, _ = self.get(self.ready_path, timeout=1.0)
            except OSError:
                status = 0
            if status == 200:
                return time.perf_counter() - self.started
            time.sleep(0.02)
        raise TimeoutError(f"not ready after {timeout} s")


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running_server(
    arguments: Sequence[str] = (),
    *,
    command: Sequence[str] = (sys.executable, "-m", "server.cli"),
    log: Path | None = None,
) -> Iterator[RunningServer]:
    """`stet serve ARGUMENTS` on a free port; ended by SIGTERM, by SIGKILL if that does not help."""
    with spawned(lambda port: [*command, "serve", *arguments, "--port", str(port)], log=log) as server:
        yield server


@contextmanager
def spawned(
    command: Callable[[int], Sequence[str]],
    *,
    ready_path: str = "/readyz",
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[RunningServer]:
    """Any server: `command` makes its command line for a free port, `environment` is added to this process's own."""
    port = free_port()
    with open(log or os.devnull, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command(port),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if environment is None else os.environ | dict(environment),
            # Ctrl-C on a terminal is for who started it, which ends the server below when it is done with it. No
            # session of its own: Linux shares the processors among sessions first, and clients would get as much.
            process_group=0,
        )
        try:
            yield RunningServer(process, "127.0.0.1", port, started, ready_path)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

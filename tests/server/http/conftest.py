from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from server.http.limits import Limits
from tests.server.http.scripted import ServerThread

# The bounds in time are shortened, so that the tests of them take a second each.
LIMITS = Limits(
    receipt_seconds=0.6, admission_seconds=0.4, keep_alive_seconds=0.3, stall_seconds=0.8, max_intake_bytes=8 * 2**20
)


@pytest.fixture(scope="session")
def _server() -> Iterator[ServerThread]:
    server = ServerThread(LIMITS)
    yield server
    server.stop()


@pytest.fixture
def server(_server: ServerThread) -> Iterator[ServerThread]:
    _server.reset()
    yield _server
    assert _server.service.num_open == 0, "a generator was left open"


@pytest.fixture
def client(server: ServerThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client

"""One real server with the embedded model for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loadtests.processes import RunningServer, running_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(["--max-waiting", "512"], log=log) as server:
        server.wait_ready()
        yield server

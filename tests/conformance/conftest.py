"""Whole servers over a fake engine: what is tested here is what a client sees, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.http.launch import Launched, launched

CONTEXT = 512


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    with launched(tmp_path_factory.mktemp("conformance"), max_model_len=CONTEXT) as server:
        yield server

"""POST /plan: what may be asked, what is answered, and what a request can never make the server do."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.hub import BUILT_IN_MODELS
from server.planner import device as planned_device
from server.planner.plan import PlanRequest, make_plan
from server.planner.report import as_dict
from server.planner.subject import find_subject
from tests.server.http.conftest import LIMITS
from tests.server.http.scripted import ServerThread

CONFIG: dict[str, Any] = json.loads((BUILT_IN_MODELS["stet-tales"] / "config.json").read_text())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "stet"


def plan(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/plan", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_served_model_on_the_servers_device(client: httpx.Client, own_cache: Path) -> None:
    found = plan(client)
    assert found["model"]["name"] == "tiny"
    assert found["model"]["parameters"] == find_subject("stet-tales").config.num_parameters
    assert found["device"]["name"].startswith("cpu (")
    # Nobody has measured this machine, and a request does not make the server do it.
    assert found["device"]["rates"] is None
    assert all(mode["speed"] is None for mode in found["quantization"].values())
    assert len(list(own_cache.iterdir())) == 1
    assert plan(client, model="tiny")["quantization"].keys() == found["quantization"].keys()


def test_the_answer_is_the_plan_of_the_command(client: httpx.Client) -> None:
    body = {"context": 512, "concurrency": 3, "quantization": "w8a8", "kv_cache_dtype": "int8", "train_devices": 4}
    found = plan(client, config=CONFIG, device="h100-80gb", memory=10**9, train_batch=2, **body)
    request = PlanRequest(memory=10**9, train_batch=2, **body)  # type: ignore[arg-type]
    expected = as_dict(make_plan(find_subject("stet-tales"), planned_device.card("h100-80gb"), request, 0))
    expected["model"]["name"] = "config"
    assert found == json.loads(json.dumps(expected))
    assert plan(client, model="70b", device="h200-141gb")["model"]["assumed_shape"] is True


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"context": -1}, "context", "context must be an integer from 1 to"),
        ({"context": True}, "context", "context must be"),
        ({"context": 4096.0}, "context", "context must be"),
        ({"context": 1025}, "context", "exceeds the 1024 positions"),
        ({"memory": 0}, "memory", "memory must be an integer from 1 to 2^60"),
        ({"memory": "24GiB"}, "memory", "memory must be"),
        ({"concurrency": 4097}, "concurrency", "concurrency must be"),
        ({"quantization": "w4"}, "quantization", "quantization must be one of none, w8a16, w8a8."),
        ({"device": "cuda"}, "device", "device must be one of a100-40gb"),
        ({"train_devices": 0}, "train_devices", "train_devices must be"),
        ({"contxt": 5}, "contxt", "Did you mean context?"),
        ({"model": "8b", "config": CONFIG}, "config", "Only one of model and config"),
        ({"model": "0b"}, "model", "'0b' is not a number of parameters"),
        ({"model": "Qwen/Qwen3-0.6B"}, "model", "nothing is looked up or downloaded here"),
        ({"model": "/etc"}, "model", "nothing is looked up or downloaded here"),
        ({"model": "stet-tales"}, "model", "nothing is looked up"),  # the folder's name, not the served one's
        ({"config": {}}, "config", "architectures is missing"),
        ({"config": {**CONFIG, "quantization_config": {"ignore": ["re:(.*)*x"]}}}, "config", "is not read here"),
        ({"config": []}, "config", "config must be an object"),
        ({"config": {**CONFIG, "architectures": ["<b>Mamba</b>"]}}, "config", "architecture '?b?Mamba?/b?' is not"),
        ({"config": {**CONFIG, "hidden_size": "x" * 10_000}}, "config", "hidden_size is 'xxx"),
        ({"config": {**CONFIG, "hidden_size": 2**30, "num_hidden_layers": 9999}}, "config", "parameters; up to 1e+15"),
        ({"model": "70b", "device": "l4-24gb"}, "memory", "are missing. What would help: "),
        ({"model": "8b", "device": "l4-24gb", "quantization": "none", "memory": 10**10}, "memory", "help: "),
        (
            {"config": {**CONFIG, "max_position_embeddings": 2**31 - 1, "num_hidden_layers": 10_000}},
            "memory",
            "missing",
        ),
    ],
)
def test_nonsense_is_refused_by_name(client: httpx.Client, body: dict[str, Any], param: str, message: str) -> None:
    answer = client.post("/plan", json={"device": "h100-80gb", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert message in error["message"]
    assert len(error["message"]) < 500
    assert not re.search("[<>]|--[a-z]", error["message"])
    assert str(Path.home()) not in answer.text


def test_all_problems_are_told_together(client: httpx.Client) -> None:
    error = client.post("/plan", json={"context": 0, "device": "x", "quantization": "y", "z": 1}).json()["error"]
    assert {detail["param"] for detail in error["details"]} == {"context", "device", "quantization", "z"}
    assert client.post("/plan", content=b"[]", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/plan", content=b"{}").status_code == 415


def test_before_the_model_is_known(client: httpx.Client, server: ServerThread) -> None:
    model, server.service.model = server.service.model, ""
    try:
        answer = client.post("/plan", json={"device": "h100-80gb"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert plan(client, model="8b", device="h100-80gb")["model"]["parameters"] > 7e9
    finally:
        server.service.model = model


@pytest.fixture
def fresh() -> Iterator[ServerThread]:
    """A server that has not been asked for a plan yet."""
    server = ServerThread(LIMITS)
    yield server
    server.stop()


def test_the_loop_goes_on_and_one_child_is_asked(fresh: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ran = subprocess.run, []

    def slow(*arguments: Any, **options: Any) -> Any:
        ran.append(json.loads(arguments[0][-1])["measure"])
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(planned_device.subprocess, "run", slow)
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        with httpx.Client(base_url=fresh.url, timeout=60) as client:
            answers.append(plan(client))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with httpx.Client(base_url=fresh.url) as prober:
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            assert prober.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 0.4
    assert ran == [False]
    assert len(answers) == 3

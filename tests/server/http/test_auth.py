"""API keys at the gate: every route and method, every spelling of a path, roles, limits, and a file that changes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.http.routes import PAGE_PATHS, ROLE_OF
from server.keys import create_key
from tests.server.http.conftest import LIMITS
from tests.server.http.scripted import ServerThread, endless
from tests.server.http.wire import Connection, RawAnswer, get, post, wait_for

OPEN = ("/livez", "/readyz", "/health")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
OK = {"prompt": "x"}


class Locked(ServerThread):
    """A server with a key for each role, and some with limits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secret = {role: create_key(path, role, [role], {}) for role in ("infer", "metrics", "admin")}
        self.secret["slow"] = create_key(path, "slow", ["infer"], {"requests_per_minute": 3})
        self.secret["short"] = create_key(path, "short", ["infer"], {"tokens_per_minute": 100})
        self.secret["narrow"] = create_key(path, "narrow", ["infer"], {"max_concurrent": 2})
        super().__init__(LIMITS, path)

    def bearer(self, name: str) -> str:
        return f"Authorization: Bearer {self.secret[name]}"


@pytest.fixture(scope="module")
def _locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    server = Locked(tmp_path_factory.mktemp("keys") / "keys.toml")
    yield server
    server.stop()


@pytest.fixture
def locked(_locked: Locked) -> Iterator[Locked]:
    _locked.reset()
    yield _locked
    assert _locked.service.num_open == 0


def ask(server: ServerThread, data: bytes, *, head: bool = False) -> RawAnswer:
    with Connection(server.port) as connection:
        connection.send(data)
        return connection.answer(head=head)


def spellings(path: str) -> list[str]:
    """Other ways to write a path, which a proxy, a router or a file system might take for the same."""
    first = f"%{ord(path[1]):02x}"
    return [
        "/" + path,
        path + "/",
        path + "//",
        path + "/.",
        "/." + path,
        "/x/.." + path,
        "/x/%2e%2e" + path,
        "/" + first + path[2:],
        "/" + first.replace("%", "%25") + path[2:],
        path.upper(),
        path[:2].upper() + path[2:],
        path.replace("/", "/%2f", 1),
        path.replace("/", "%2f"),
        path + "%00",
        path + "%20",
        path + ";x=1",
        path + "%3f",
        "\\" + path[1:],
    ]


@pytest.mark.parametrize("method", METHODS)
def test_without_a_key_nothing_but_the_probes_and_the_page_answers(locked: Locked, method: str) -> None:
    """Whatever is written where a path belongs: no route is reached, none can be told from one that does not exist."""
    paths = [
        "/docs",
        "/openapi.json",
        "/v1/models/tiny",
        "/nothing",
        "*",
        "http://livez/generate",
        "//",
        "/%2e",
        "/index.html",
    ]
    paths += ["/static/", "/static/../info", "/static/%2e%2e/app.js", "/static/app.py", *spellings("/static/app.js")]
    for route in ROLE_OF:
        paths += spellings(route)
        if route not in OPEN:
            paths += [route, route + "?x=/livez", route + "?/livez", "http://test" + route]
    refused = None
    for path in paths:
        answer = ask(locked, get(path, method), head=method == "HEAD")
        if method == "HEAD":
            assert answer.status in (400, 401), path
            continue
        if answer.status == 400:  # not HTTP for the parser
            continue
        assert answer.status == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.error["code"] == "unauthorized"
        refused = refused or answer.body
        assert answer.body == refused, "the answer tells nothing of the path"
    assert locked.service.seen == []


@pytest.mark.parametrize("path", PAGE_PATHS)
def test_the_page_is_open_and_holds_nothing_of_this_server(locked: Locked, path: str) -> None:
    answer = ask(locked, get(path))
    assert answer.status == 200
    assert b"tiny" not in answer.body, "the name of the model"
    assert ask(locked, get(path, "POST")).status == 405


@pytest.mark.parametrize("path", OPEN)
def test_probes_are_open_and_say_nothing_else(locked: Locked, path: str) -> None:
    answer = ask(locked, get(path))
    assert answer.status == 200
    assert set(json.loads(answer.body)) == {"status"}
    assert ask(locked, get(path, "POST")).status == 405


@pytest.mark.parametrize("host", ["livez", "127.0.0.1/livez", "x\t", "[::1]", "a:b@livez", "livez/../generate", ""])
def test_the_host_opens_nothing(locked: Locked, host: str) -> None:
    for head in (
        "Host: " + host,
        "Host: test\r\nX-Forwarded-Host: livez\r\nX-Original-URL: /livez\r\nX-Rewrite-URL: /livez",
    ):
        answer = ask(locked, f"GET /info HTTP/1.1\r\n{head}\r\n\r\n".encode())
        assert answer.status in (400, 401)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Authorization:",
        "Authorization: Bearer",
        "Authorization: Bearer ",
        "Authorization: Basic {key}",
        "Authorization: {key}",
        "Authorization: Bearer {key}x",
        "Authorization: Bearer {upper}",
        "Authorization: Bearer {short}",
        "Authorization: Bearer {key}\r\nAuthorization: Bearer {key}",
        "Authorization: Bearer x\r\nAuthorization: Bearer {key}",
        "Authorization: Bearer {key},{key}",
        "X-API-Key: {key}",
        "Cookie: key={key}",
        "Authorization: Bearer \xff\xfe",
        "Authorization: Bearer " + "x" * 10_000,
        "Proxy-Authorization: Bearer {key}",
    ],
)
def test_what_is_no_key(locked: Locked, header: str) -> None:
    key = locked.secret["admin"]
    filled = header.format(key=key, upper=key.upper(), short=key[:-1])
    answer = ask(locked, get("/info", "GET", *([filled] if filled else [])))
    assert (answer.status, answer.error["code"]) == (401, "unauthorized")
    assert key not in answer.body.decode()
    answer = ask(locked, get(f"/info?api_key={key}"))
    assert answer.status == 401


def test_roles(locked: Locked) -> None:
    for name in ("infer", "metrics", "admin"):
        for route, role in ROLE_OF.items():
            answer = ask(locked, get(route, "GET", locked.bearer(name)))
            if role is None or name in (role, "admin"):
                assert answer.status in (200, 405), (name, route)
            else:
                assert (answer.status, answer.error["code"]) == (403, "forbidden"), (name, route)
                assert role in answer.error["message"]


def test_no_spelling_of_a_path_gives_another_role(locked: Locked) -> None:
    for route in ROLE_OF:
        for path in spellings(route):
            for name in ("infer", "metrics", "admin"):
                answer = ask(locked, get(path, "GET", locked.bearer(name)))
                # Below /v1/models every path is a model's name.
                named = path.startswith("/v1/models/") and path != "/v1/models/" and name == "metrics"
                assert answer.status in ((403,) if named else (400, 404)), (path, name)


def test_a_scheme_has_no_case(locked: Locked) -> None:
    for scheme in ("bearer", "BEARER", "Bearer  "):
        assert ask(locked, get("/info", "GET", f"Authorization: {scheme} {locked.secret['infer']}")).status == 200


def test_a_body_without_a_key_is_not_read(locked: Locked) -> None:
    with Connection(locked.port) as connection:
        began = time.monotonic()
        connection.send(post(b"", length=2**20))
        assert connection.answer().status == 401
        assert time.monotonic() - began < LIMITS.receipt_seconds / 2


def test_the_tenant_is_the_key(locked: Locked) -> None:
    for path, body in (
        ("/generate", OK),
        ("/v1/completions", {"prompt": ["x", "y"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        locked.service.seen = []
        assert ask(locked, post(body, path, locked.bearer("infer"))).status == 200
        assert {request.tenant for request in locked.service.seen} == {"infer"}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_priority_above_zero_needs_the_admin(locked: Locked, server: ServerThread, path: str) -> None:
    urgent = OK | {"priority": 100}
    answer = ask(locked, post(urgent, path, locked.bearer("infer")))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (403, "forbidden", "priority")
    assert ask(server, post(urgent, path)).status == 403, "without keys nobody is an administrator"
    assert ask(locked, post(urgent, path, locked.bearer("admin"))).status == 200
    assert locked.service.seen[-1].priority == 100
    assert ask(locked, post(OK | {"priority": 101}, path, locked.bearer("admin"))).status == 400
    assert ask(locked, post(OK | {"priority": -100}, path, locked.bearer("infer"))).status == 200


# Limits


def retry_after(answer: RawAnswer) -> int:
    assert (answer.status, answer.error["code"], answer.error["type"]) == (429, "rate_limited", "rate_limit_error")
    return int(answer.headers["retry-after"])


def test_requests_a_minute(locked: Locked) -> None:
    answers = [ask(locked, post(OK, "/generate", locked.bearer("slow"))) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert 15 <= retry_after(answers[3]) <= 20
    assert retry_after(ask(locked, get("/v1/models", "GET", locked.bearer("slow")))) > 10
    assert ask(locked, get("/livez", "GET", locked.bearer("slow"))).status == 200
    assert ask(locked, post(OK, "/generate", locked.bearer("infer"))).status == 200


def test_tokens_a_minute(locked: Locked) -> None:
    assert locked.keys is not None
    assert ask(locked, post(OK, "/generate", locked.bearer("short"))).status == 200
    locked.keys.spend("short", 250)
    assert 80 <= retry_after(ask(locked, post(OK, "/generate", locked.bearer("short")))) <= 91
    assert ask(locked, get("/info", "GET", locked.bearer("short"))).status == 200, "nothing is generated there"


def test_choices_at_once(locked: Locked) -> None:
    locked.service.script = endless
    stream = post(OK | {"stream": True}, "/generate", locked.bearer("narrow"))
    with Connection(locked.port) as first, Connection(locked.port) as second:
        for connection in (first, second):
            connection.send(stream)
            connection.read_until(b"data:")
        assert 1 <= retry_after(ask(locked, stream)) <= 60
        assert locked.service.num_open == 2
    wait_for(lambda: locked.service.num_open == 0)
    locked.reset()
    # The key's own places are given back a moment after the service's.
    wait_for(lambda: ask(locked, post(OK | {"n": 2}, "/generate", locked.bearer("narrow"))).status == 200)
    answer = ask(locked, post(OK | {"n": 3}, "/generate", locked.bearer("narrow")))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (403, "forbidden", "n")
    for _ in range(5):  # a refused request keeps no place
        assert ask(locked, post(OK | {"n": 2}, "/generate", locked.bearer("narrow"))).status == 200


def test_refusals_are_counted(locked: Locked) -> None:
    def counted(outcome: str) -> float:
        text = locked.metrics.render(None)[0].decode()
        name = f'stet_requests_total{{endpoint="/generate",outcome="{outcome}"}} '
        return next(float(line[len(name) :]) for line in text.splitlines() if line.startswith(name))

    before = {outcome: counted(outcome) for outcome in ("unauthorized", "forbidden")}
    ask(locked, post(OK))
    ask(locked, post(OK, "/generate", locked.bearer("metrics")))
    assert {outcome: counted(outcome) - value for outcome, value in before.items()} == {
        "unauthorized": 1,
        "forbidden": 1,
    }


# The file changes


def test_reload(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "keys.toml"
    first = create_key(path, "first", ["infer"], {"requests_per_minute": 2})
    server = ServerThread(LIMITS, path)
    keys = server.keys
    assert keys is not None
    try:

        def status(key: str) -> int:
            return ask(server, get("/v1/models", "GET", f"Authorization: Bearer {key}")).status

        def metric(name: str) -> float:
            text = server.metrics.render(None)[0].decode()
            return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))

        def reload() -> None:
            server.call(keys.reload)

        assert status(first) == 200
        second = create_key(path, "second", ["infer"], {})
        assert status(second) == 401
        reload()
        assert status(second) == 200
        assert status(first) == 200, "the old ones stay"
        assert status(first) == 429, "a reload does not reset what was used"
        good = path.read_bytes()
        for broken in (b"", b"[[key]]\nname = ", b"\xff", good + b"x", good.replace(b"infer", b"boss")):
            path.write_bytes(broken)
            caplog.clear()
            refused = metric('stet_api_key_reloads_total{outcome="refused"}')
            reload()
            reload()
            assert status(second) == 200
            assert metric('stet_api_key_reloads_total{outcome="refused"}') - refused <= 1, "said once"
            assert all(key not in caplog.text for key in (first, second))
        path.unlink()
        caplog.clear()
        reload()
        assert "API keys not reloaded" in caplog.text
        assert status(second) == 200
        assert metric("stet_api_keys") == 2
        path.write_bytes(good)
        reload()
        third = create_key(path, "third", ["infer"], {})
        path.write_text("[[key]]" + path.read_text().split("[[key]]")[-1])
        reload()
        assert (status(second), status(third)) == (401, 200), "what is not in the file is revoked"
        assert metric("stet_api_keys") == 1
    finally:
        server.stop()


def test_the_file_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.auth._RELOAD_SECONDS", 0.01)
    path = tmp_path / "keys.toml"
    create_key(path, "first", ["infer"], {})
    server = ServerThread(LIMITS, path)
    keys = server.keys
    assert keys is not None
    try:

        async def watch() -> None:
            server.watching = asyncio.create_task(keys.watch())  # type: ignore[attr-defined]

        server.call(watch)
        key = create_key(path, "second", ["infer"], {})
        wait_for(lambda: keys.find(key) is not None)

        async def end() -> None:
            server.watching.cancel()  # type: ignore[attr-defined]

        server.call(end)
    finally:
        server.stop()

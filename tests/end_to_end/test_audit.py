"""What the running processes do while they answer: no connection, no program, no pickle, no file but Python's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.processes import RunningServer, running_server
from server.http.routes import ROUTES
from tests.server.http.wire import Connection, RawAnswer, get, post, wait_for

BODIES = (
    ("/generate", {"prompt": "Once", "max_new_tokens": 4}),
    ("/generate", {"prompt": "Once", "max_new_tokens": 4, "stream": True, "n": 2, "stop": ["x"], "seed": 1}),
    ("/generate", {"messages": [{"role": "user", "content": "{{ 7*7 }} <|end|>"}], "max_new_tokens": 4}),
    ("/generate", {"prompt": "x " * 3000}),
    ("/generate", {"prompt": 5}),
    ("/generate", {"prompt": "x", "chat_template": "{{ cycler.__init__.__globals__.os.popen('id') }}"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3}),
    ("/v1/completions", {"prompt": "a", "model": "../../etc/passwd"}),
    ("/v1/completions", {"prompt": "a", "model": "http://127.0.0.1:9/model"}),
    ("/tokenize", {"prompt": "x"}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/plan", {"model": "8b", "device": "h100-80gb"}),
    ("/plan", {"model": "/etc/passwd"}),
    ("/plan", {"model": "someone/model"}),
    ("/plan", {"config": {"model_type": "llama", "auto_map": {"AutoModel": "evil--code"}}}),
)  # fmt: skip


class Audited:
    """A server with hooks; `events` are those since the last look."""

    def __init__(self, server: RunningServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self._seen: dict[str, int] = {}

    def ask(self, data: bytes) -> RawAnswer:
        with Connection(self.server.port) as connection:
            connection.send(data)
            return connection.answer()

    def events(self, role: str) -> list[str]:
        lines = (self.folder / role).read_text().splitlines()
        start = self._seen.get(role, 0)
        self._seen[role] = len(lines)
        return lines[start:]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audit")
    command = (sys.executable, "-m", "tests.end_to_end.audited", str(folder))
    with running_server(command=command, log=folder / "log") as server:
        server.wait_ready()
        yield Audited(server, folder)


def suspicious(line: str) -> bool:
    """Whether an event is none of those that an import, or a look at the machine's memory, has too."""
    event, _, arguments = line.partition(" ")
    if event in ("compile", "import", "exec", "marshal.loads", "code.__new__", "gc.freeze"):
        return False
    if event != "open":
        return True
    path, _, rest = arguments.partition(" ")
    mode = rest.partition(" ")[0]
    reads = mode in ("'r'", "'rb'", "None") and path.strip("'\"").endswith((".py", ".pyc", ".so", "config.json"))
    return not reads and not path.strip("'").startswith(("/proc/", "/sys/"))


def sockets_of(pid: int) -> set[str]:
    found = set()
    for item in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(item)):
                found.add(match[1])
    return found


def outward(pid: int, port: int) -> list[str]:
    """Connections of a process that did not come to its port."""
    mine, found = sockets_of(pid), []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in mine and int(fields[1].rsplit(":", 1)[1], 16) != port:
                found.append(line)
    return found


def test_the_hooks_see_the_start(audited: Audited) -> None:
    """Otherwise what follows would prove nothing."""
    http, engine = audited.events("serve"), audited.events("engine")
    assert any(line.startswith("subprocess.Popen") for line in http)
    assert any(line.startswith("open") and "model.safetensors" in line for line in engine)
    for lines in (http, engine):
        assert not any(line.startswith(("pickle.find_class", "socket.connect", "urllib.Request")) for line in lines)


def test_the_collector_leaves_alone_what_was_loaded(audited: Audited) -> None:
    """Else it looks at all of it in the middle of a request, and every stream waits."""
    for role in ("serve", "engine"):

        def frozen(role: str = role) -> bool:
            lines = (audited.folder / role).read_text().splitlines()
            return any(line.startswith("gc.freeze") and int(line.split()[1]) > 10_000 for line in lines)

        wait_for(frozen)


def test_nothing_is_done_but_to_answer(audited: Audited) -> None:
    for path, body in BODIES:  # what is imported late is imported now
        audited.ask(post(dict(body), path))
    for route in ROUTES:
        audited.ask(get(route))
    pid = audited.server.process.pid
    seen = audited.events("serve") + audited.events("engine")
    assert [line for line in seen if suspicious(line)] == []
    statuses = [audited.ask(post(dict(body), path)).status for path, body in BODIES]
    assert {200, 400, 404} <= set(statuses) <= {200, 400, 404, 501}
    for line in audited.events("serve") + audited.events("engine"):
        assert line.startswith("open '/proc/"), line
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1, "the engine and nobody else"
    for process in (pid, int(children[0])):
        assert outward(process, audited.server.port) == []


def test_nothing_of_the_inside_is_told(audited: Audited) -> None:
    root = str(Path(__file__).resolve().parents[2])
    for path, body in BODIES:
        text = audited.ask(post(dict(body), path)).body.decode()
        for secret in (root, "site-packages", "Traceback", "0x7f", "root:", ".py"):
            assert secret not in text, (path, text)
        if "error" in text[:10]:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code", "details"}

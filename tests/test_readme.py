"""The README and the code say the same: routes and roles, commands and flags, and bodies that are accepted as shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server.cli import _parse
from server.http.limits import Limits
from server.http.openai.schemas import parse_chat
from server.http.openapi import openapi_document
from server.http.routes import ROLE_OF
from server.http.schemas import parse_generate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(text for language, text in BLOCKS if language == "sh").replace("\\\n", " ")


def section(title: str) -> str:
    start = README.index(f"\n## {title}\n")
    return README[start : README.index("\n## ", start + 4)]


def test_routes_and_roles() -> None:
    rows = re.findall(r"^\| `(GET|POST) (\S+)` \| .+ \| (\w+) \|$", section("API"), re.MULTILINE)
    assert {route: role for _, route, role in rows} == {route: role or "open" for route, role in ROLE_OF.items()}
    paths = {path: item for path, item in openapi_document(Limits(), False)["paths"].items() if "{" not in path}
    assert {route: method.lower() for method, route, _ in rows} == {
        route: next(iter(operations)) for route, operations in paths.items()
    }
    for path in re.findall(r"`(/[a-z/]+)`", section("Security")):
        assert path in ROLE_OF
        assert ROLE_OF[path] is None, "what is called open is open"
    assert sum(role is None for role in ROLE_OF.values()) == 3


def test_bodies_are_accepted() -> None:
    bodies = re.findall(r"(\S+) -H 'Content-Type: application/json'\s+-d '(\{.*?\})'", SHELL, re.DOTALL)
    assert len(bodies) == SHELL.count(" -d '") >= 2
    for url, body in bodies:
        parsed = (parse_generate if url.endswith("/generate") else parse_chat)(json.loads(body))
        assert (parsed.problems, parsed.unsupported) == ([], []), body


def test_commands_can_be_parsed() -> None:
    commands = re.findall(r"^stet (.+?)(?:\s+#.*)?$", SHELL, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        arguments = command.split()
        # `stet plan` adds its flags only when it is the command.
        assert _parse(arguments).command == arguments[0]
    makes = set(re.findall(r"[`\n]make ([a-z-]+)", README))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert makes >= {"serve", "test", "check", "fuzz"}
    assert makes <= targets


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "name", ["api", "design", "sampling", "planner", "kernels", "cpu", "quantization", "playground"]
)
def test_every_page_is_linked(name: str) -> None:
    assert f"docs/{name}.md" in README

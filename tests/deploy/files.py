"""What the files for running Stet say, read once: compose, Dockerfile, rules, dashboard."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import dockerfile
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def compose() -> dict[str, Any]:
    """docker-compose.yml with its anchors resolved."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def environment_file() -> dict[str, str]:
    """.env: NAME=VALUE lines."""
    lines = (line for line in (ROOT / ".env").read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def enabled(profile: str) -> dict[str, Any]:
    """The services that `docker compose --profile PROFILE up` starts."""
    services: dict[str, Any] = compose()["services"]
    return {name: service for name, service in services.items() if profile in service.get("profiles", [profile])}


@dataclass(frozen=True)
class Stage:
    """One stage of the Dockerfile: what it is made from, and its instructions as (name, flags, words)."""

    name: str
    base: str
    instructions: list[tuple[str, tuple[str, ...], tuple[str, ...]]]

    def of(self, instruction: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        return ((flags, words) for name, flags, words in self.instructions if name == instruction)


def stages() -> dict[str, Stage]:
    """The stages in order."""
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for command in dockerfile.parse_file(str(ROOT / "Dockerfile")):
        name = command.cmd.upper()
        if name == "FROM":
            base, _, stage = command.value
            current = found[stage] = Stage(stage, base, [])
        elif current is not None:
            current.instructions.append((name, command.flags, command.value))
    return found


def global_arguments() -> dict[str, str]:
    """ARGs before the first FROM."""
    found: dict[str, str] = {}
    for command in dockerfile.parse_file(str(ROOT / "Dockerfile")):
        if command.cmd.upper() == "FROM":
            return found
        name, _, value = command.value[0].partition("=")
        found[name] = value
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those that it is made from, itself first."""
    known, found = stages(), []
    while name in known:
        found.append(known[name])
        name = known[name].base
    return found


@dataclass(frozen=True)
class Contents:
    """Absolute paths that a stage holds beyond its base image: whence in the repository, or "" where a step made it."""

    origin: dict[str, str]

    def holds(self, path: str) -> bool:
        for parent in (PurePosixPath(path), *PurePosixPath(path).parents):
            source = self.origin.get(str(parent))
            if source is not None:
                return source == "" or (ROOT / source / PurePosixPath(path).relative_to(parent)).exists()
        return any(PurePosixPath(path) in PurePosixPath(held).parents for held in self.origin)


def contents(name: str) -> Contents:
    """What a stage and those below it put there. Raises AssertionError if an instruction needs what is not there."""
    found, folder = Contents({}), "/"
    for stage in reversed(lineage(name)):
        for instruction, flags, words in stage.instructions:
            if instruction == "WORKDIR":
                folder = words[0]
            elif instruction == "COPY":
                *sources, target = words
                place = posixpath.normpath(posixpath.join(folder, target))
                for source in sources:
                    if flags:
                        assert contents(flags[0].removeprefix("--from=")).holds(source), f"{name}: {source}"
                        found.origin[place] = ""
                    else:
                        into = target.endswith("/") and not source.endswith("/")
                        found.origin[posixpath.join(place, source) if into else place] = source
            elif instruction == "RUN":
                for script, step, rest in re.findall(r"(\S+\.sh) ([\w-]+)(.*)", words[0]):
                    assert found.holds(posixpath.join(folder, script)), f"{name}: {script}"
                    places = [word for word in rest.split() if word.startswith("/")]
                    for place in places:
                        # The last step finds what the ones before it have made.
                        assert step != "project" or found.holds(place), f"{name}: {place}"
                        found.origin[place] = ""
    return found


def last(name: str, instruction: str) -> tuple[str, ...]:
    """The words of an instruction that counts for a stage: the last of its own, else of what it is made from."""
    for stage in lineage(name):
        own = list(stage.of(instruction))
        if own:
            return own[-1][1]
    raise KeyError(f"{name} has no {instruction}")


def image_environment(name: str) -> dict[str, str]:
    """The variables of an image, without those that hold others ($PATH)."""
    found: dict[str, str] = {}
    for stage in reversed(lineage(name)):
        for _, words in stage.of("ENV"):
            found |= dict(zip(words[::2], words[1::2], strict=True))
    return found


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    files = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "stet.json").read_text())
    return loaded


def queries() -> dict[str, str]:
    """ "panel / legend" -> PromQL with Grafana's variables filled in."""
    found: dict[str, str] = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            filled = target["expr"].replace("$job", "stet").replace("$instance", ".*")
            found[f"{panel['title']} / {target['legendFormat']}"] = filled.replace("$__rate_interval", "30s")
    return found


def without_thresholds(expression: str) -> str:
    """An alert's expression that has a value whether or not the alert fires: comparisons with numbers are left out."""
    return re.sub(r"\s*(==|!=|>=|<=|>|<)\s*[\d.]+(e-?\d+)?(\s*\*\s*[\d.]+)?", "", expression)

"""`make bench-hard`: all of the hard situations at their full size, each against a server of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from loadtests.hard.parts import Result, disconnects, flood, overload, readers
from loadtests.machine import describe_machine
from loadtests.peers.checkpoints import make_checkpoint, shapes
from loadtests.peers.environment import model_folder
from loadtests.processes import RunningServer, running_server
from server.keys import create_key


def _run(flags: list[str], part: Callable[[RunningServer], Coroutine[Any, Any, Result]]) -> Result:
    with running_server(flags) as server:
        server.wait_ready()
        # uvloop: what the clients need is taken from the server, on the same machine.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(part(server))


def run_flood(folder: Path, flags: list[str], num_requests: int, at_once: int, new_tokens: int) -> Result:
    """The flood, against a server with two keys."""
    path = folder / "keys.toml"
    keys = {name: create_key(path, name, ["infer"], {}) for name in ("flood", "quiet")}
    return _run(
        [*flags, "--api-keys", str(path)], lambda server: flood(server, keys, num_requests, at_once, new_tokens)
    )


def run_large_overload(flags: list[str]) -> Result:
    """The overload of a model that keeps the processors busy by itself: there refusals are few beside its work."""
    folder = model_folder("llama-176m") / "hf"
    make_checkpoint(shapes()["llama-176m"], folder)
    return _run([str(folder), "--quantization", "auto", *flags], lambda server: overload(server, 8, 30.0, 64))


def main() -> int:
    names = ("disconnects", "readers", "overload", "overload-176m", "flood", "flood-wide")
    parser = argparse.ArgumentParser(prog="python -m loadtests.hard", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*names, []], help="which parts; all by default")
    arguments = parser.parse_args()
    few = ["--max-running", "8", "--max-waiting", "16"]
    parts: dict[str, Callable[[], Result]] = {
        "disconnects": lambda: _run([], lambda server: disconnects(server, 1000)),
        "readers": lambda: _run([], lambda server: readers(server, 100, 60, 900)),
        "overload": lambda: _run(few, lambda server: overload(server, 8, 10.0, 128)),
        "overload-176m": lambda: run_large_overload(few),
        "flood": lambda: run_flood(Path(tempfile.mkdtemp()), ["--max-running", "2"], 60, 64, 64),
        # With all the places of a default server, where a step could be as long as 64 streams make it.
        "flood-wide": lambda: run_flood(Path(tempfile.mkdtemp()), [], 60, 64, 64),
    }
    failed = False
    results: dict[str, Any] = {"machine": describe_machine()}
    for name in arguments.parts or names:
        print(f"{name} …", file=sys.stderr, flush=True)
        result = results[name] = parts[name]()
        failed |= bool(result["failures"])
        for key, value in result.items():
            print(f"  {key}: {value}")
    print(json.dumps(results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""One contestant in a process of its own, which loads a model once and then does what its parent asks, line by line.

    PYTHON -m loadtests.peers.worker CONTESTANT MODEL_FOLDER

PYTHON is that of the contestant's own environment, so nothing here or in `contestants` may import a package of ours at
the top. Requests and answers are JSON, one a line: {"op": "measure", "cells": [["decode", 4], …], "seed": 1} is
answered with {"measured": [[rate, seconds or null], …]}, {"op": "generate", "prompts": […], "new_tokens": 8} with
{"tokens": […]}. An exception is answered with {"error": …} and ends the process. The contestant's own output goes to
standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

ROOT = Path(__file__).resolve().parents[2]


class WorkerError(RuntimeError):
    """A contestant that could not do what was asked. One line."""


class Worker:
    """The parent's end: a started process, ready once `hello` is there.

    hello: versions, settings and load_seconds, as the contestant tells them.
    """

    def __init__(
        self, python: Path | str, contestant: str, folder: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        """Start the process and wait until its model is loaded. Raises WorkerError."""
        self.name = contestant
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", "loadtests.peers.worker", contestant, str(folder)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | dict(environment),
                text=True,
            )
        try:
            self.hello: dict[str, Any] = self._answer()
        except WorkerError:
            self.close()
            raise

    def measure(self, cells: Sequence[tuple[str, int]], seed: int) -> list[tuple[float, float | None]]:
        """Of each cell, ("prefill" or "decode", batch size): tokens a second, and the seconds of a decode step outside
        compiled kernels where they are known. Raises WorkerError."""
        answer = self._ask({"op": "measure", "cells": [list(cell) for cell in cells], "seed": seed})
        return [(rate, host) for rate, host in answer["measured"]]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt. Raises WorkerError."""
        answer = self._ask({"op": "generate", "prompts": prompts, "new_tokens": new_tokens})
        return cast("list[list[int]]", answer["tokens"])

    def ranks(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Asked of the reference: at which place of its logits each token stands, 0 being the most likely one."""
        answer = self._ask({"op": "ranks", "prompts": prompts, "tokens": tokens})
        return cast("list[list[int]]", answer["ranks"])

    def close(self) -> None:
        """Let the process end; kill it if it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, message: Mapping[str, object]) -> dict[str, Any]:
        stdin = cast("IO[str]", self._process.stdin)
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # the answer below says how it ended
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"{self.name} ended with exit code {code}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self._process.wait()
            raise WorkerError(f"{self.name}: {answer['error']}; see {self._log}")
        return answer


def main(arguments: Sequence[str]) -> int:
    """The child's loop. Returns its exit code."""
    # Libraries print on standard output; the answers get a descriptor of their own before any is imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: Mapping[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    import time

    from loadtests.peers import contestants

    try:
        name, folder = arguments
        started = time.perf_counter()
        contestant = contestants.load(name, Path(folder))
        seconds = time.perf_counter() - started
        answer({"versions": contestant.versions(), "settings": contestant.settings, "load_seconds": round(seconds, 2)})
        for line in sys.stdin:
            message = json.loads(line)
            if message["op"] == "measure":
                cells = [(kind, batch) for kind, batch in message["cells"]]
                answer({"measured": contestant.measure(cells, message["seed"])})
            elif message["op"] == "generate":
                answer({"tokens": contestant.generate(message["prompts"], message["new_tokens"]).tokens})
            elif message["op"] == "ranks" and isinstance(contestant, contestants.Transformers):
                answer({"ranks": contestant.ranks(message["prompts"], message["tokens"])})
            else:
                raise ValueError(f"{name} does not know {message['op']!r}")
    except Exception as error:
        lines = str(error).splitlines()
        answer({"error": f"{type(error).__name__}: {lines[0] if lines else ''}"})
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

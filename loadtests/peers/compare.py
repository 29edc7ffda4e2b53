"""Runs the comparison: the gate, then rounds of A B B A over all contestants, in the engine and over HTTP.

A round visits every contestant in order and then in reverse order, so that a machine that slows down slows all of them.
Long cells are measured in one of the two passes, forward in odd rounds and backward in even ones: half the samples.
All contestants stay loaded during the rounds, and only the one that is visited computes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.peers import environment, servers
from loadtests.peers.contestants import random_prompts
from loadtests.peers.worker import ROOT, Worker, WorkerError
from loadtests.processes import RunningServer, spawned

Cell = tuple[str, int]
Say = Callable[[str], None]

SHORT_CELLS: tuple[Cell, ...] = (("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 8))
LONG_CELLS: tuple[Cell, ...] = (("prefill", 8), ("decode", 16), ("decode", 32))
CELLS: tuple[Cell, ...] = (("prefill", 1), ("prefill", 8), *(("decode", batch) for batch in (1, 4, 8, 16, 32)))

# Far from the lead in every earlier measurement, and slow: fewer visits, so that all of it takes half an hour.
FOLLOWERS = ("ctranslate2", "transformers")

# The gate: greedy tokens against the logits of float32 transformers, each given the tokens before it. int8 may tip a
# close choice; a broken conversion gives any of the 32,000 ids.
GATE_PROMPTS, GATE_PROMPT_LEN, GATE_TOKENS = 8, 96, 8
GATE_TOP_1, GATE_TOP_10 = 0.6, 0.95

# Clients at once -> requests of each, one after another.
HTTP_CLIENTS = {1: 3, 4: 2, 16: 1}
HTTP_TOKENS = 64
SERVERS = ("llama.cpp", "vllm")


@dataclass(slots=True)
class Entry:
    """What is known of one contestant with one model. samples: tokens a second of each cell, one a visit; host: the
    seconds of a decode step that are Python's, where they are known."""

    hello: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    samples: dict[Cell, list[float]] = field(default_factory=dict)
    host: dict[Cell, list[float]] = field(default_factory=dict)
    left_out: str | None = None


@dataclass(slots=True)
class HttpEntry:
    """ready: seconds from each of two starts to readiness. rates and first: of each number of clients, one a visit."""

    ready: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=dict)
    first: dict[int, list[float]] = field(default_factory=dict)
    left_out: str | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """One turn of a contestant. number: of the visit, from 0. long: whether the long cells are due too."""

    number: int
    name: str
    long: bool


def visits(contestants: Sequence[str], rounds: int, followers: Sequence[str] = ()) -> list[Visit]:
    """All turns in the order of A B B A. Followers, who are slow and far from the lead, are visited in one pass of each
    round, with the long cells in the first round alone."""
    order: list[Visit] = []
    for round_ in range(1, rounds + 1):
        for backward in (False, True):
            due = backward == (round_ % 2 == 0)
            for name in reversed(contestants) if backward else contestants:
                if name not in followers:
                    order.append(Visit(len(order), name, due))
                elif due:
                    order.append(Visit(len(order), name, round_ == 1))
    return order


def passes_gate(ranks: Sequence[Sequence[int]]) -> tuple[bool, dict[str, float]]:
    """Whether enough tokens are the most likely ones, or nearly, by the reference's logits; and the shares."""
    flat = [rank for row in ranks for rank in row]
    shares = {
        "top_1": sum(rank == 0 for rank in flat) / len(flat),
        "top_10": sum(rank < 10 for rank in flat) / len(flat),
    }
    return shares["top_1"] >= GATE_TOP_1 and shares["top_10"] >= GATE_TOP_10, shares


def compare_engines(
    model: str, contestants: Sequence[str], rounds: int, quantization: str, say: Say
) -> dict[str, Entry]:
    """Load all contestants, hold each to the gate, then measure. One that fails is left out, with the reason."""
    entries = {name: Entry() for name in contestants}
    variables = environment.worker_environment(quantization)
    workers: dict[str, Worker] = {}

    def start(name: str) -> Worker:
        log = environment.LOGS / f"worker-{name}-{model}.log"
        log.unlink(missing_ok=True)
        return Worker(environment.python_of(name), name, environment.model_folder(model), log, variables)

    def leave_out(name: str, reason: str) -> None:
        entries[name].left_out = reason
        say(f"{model}: {name} is left out: {reason}")
        if name in workers:
            workers.pop(name).close()

    with ExitStack() as stack:
        say(f"{model}: loading the reference, transformers in float32")
        reference = start("reference")
        stack.callback(reference.close)
        prompts = random_prompts(GATE_PROMPTS, GATE_PROMPT_LEN, 7)
        for name in contestants:
            try:
                say(f"{model}: loading {name}")
                worker = workers[name] = start(name)
                stack.callback(worker.close)
                entries[name].hello = worker.hello
                ranks = reference.ranks(prompts, worker.generate(prompts, GATE_TOKENS))
                passed, entries[name].gate = passes_gate(ranks)
                if not passed:
                    leave_out(name, f"its tokens are not those of the model: {entries[name].gate}")
            except WorkerError as error:
                leave_out(name, str(error))
        reference.close()

        for name, worker in list(workers.items()):
            try:
                say(f"{model}: warming {name} up")
                worker.measure([("prefill", 1), ("decode", 1), ("decode", 4)], seed=10**6)
            except WorkerError as error:
                leave_out(name, str(error))

        began = time.perf_counter()
        order = visits(list(workers), rounds, FOLLOWERS)
        for visit in order:
            if visit.name not in workers:
                continue
            cells = [cell for cell in CELLS if visit.long or cell in SHORT_CELLS]
            samples = entries[visit.name].samples
            try:
                measured = workers[visit.name].measure(cells, seed=visit.number)
                for cell, (rate, host) in zip(cells, measured, strict=True):
                    samples.setdefault(cell, []).append(rate)
                    if host is not None:
                        entries[visit.name].host.setdefault(cell, []).append(host)
            except WorkerError as error:
                leave_out(visit.name, str(error))
                continue
            shown = ", ".join(f"{kind} {batch}: {samples[kind, batch][-1]:.0f}" for kind, batch in cells)
            clock = f"{time.perf_counter() - began:.0f} s"
            say(f"{model}: visit {visit.number + 1} of {len(order)}, {clock}: {visit.name}, tokens/s: {shown}")
    return entries


def make_server(name: str, model: str, quantization: str) -> servers.Server:
    """The server of a contestant. Raises ValueError for one that has none here."""
    folder = environment.model_folder(model)
    if name == "stet":
        return servers.stet(folder / "hf", quantization)
    if name == "llama.cpp":
        return servers.llama_server(environment.llama_binaries(), folder)
    if name == "vllm":
        # Its server runs the engine in a process of its own, as it does by default.
        variables = environment.worker_environment(quantization)
        variables = {name: value for name, value in variables.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        return servers.vllm(environment.python_of("vllm"), folder, variables)
    raise ValueError(f"{name} has no server here; those compared over HTTP are stet, {', '.join(SERVERS)}")


def compare_servers(
    model: str, contestants: Sequence[str], rounds: int, quantization: str, say: Say
) -> dict[str, HttpEntry]:
    """Start each server twice for its time to readiness, then measure all of them with streaming clients."""
    entries = {name: HttpEntry() for name in contestants}
    running: dict[str, RunningServer] = {}
    with ExitStack() as stack:
        for name in contestants:
            server = make_server(name, model, quantization)
            environment_ = servers.thread_environment() | server.environment
            log = environment.LOGS / f"server-{name}-{model}.log"

            def start(
                server: servers.Server = server, variables: Mapping[str, str] = environment_, log: Path = log
            ) -> Any:
                return spawned(server.command, ready_path=server.ready_path, environment=variables, log=log)

            try:
                say(f"{model}: starting the server of {name}, twice")
                with start() as first:
                    entries[name].ready.append(first.wait_ready(server.ready_timeout))
                second = stack.enter_context(start())
                entries[name].ready.append(second.wait_ready(server.ready_timeout))
                running[name] = second
                ask(second.url, clients=4, requests=1, seed=10**4)
            except (RuntimeError, TimeoutError, OSError) as error:
                entries[name].left_out = f"{error} (see {log.relative_to(ROOT)})"
                running.pop(name, None)
                say(f"{model}: the server of {name} is left out: {entries[name].left_out}")

        order = visits(list(running), rounds)
        for visit in order:
            name = visit.name
            if name not in running:
                continue
            entry = entries[name]
            try:
                for clients, requests in HTTP_CLIENTS.items():
                    answer = ask(running[name].url, clients, requests, seed=100 * visit.number + clients)
                    entry.rates.setdefault(clients, []).append(answer["tokens"] / answer["seconds"])
                    entry.first.setdefault(clients, []).append(statistics.median(answer["first"]))
            except RuntimeError as error:
                entry.left_out = str(error)
                running.pop(name)
                say(f"{model}: the server of {name} is left out: {error}")
                continue
            shown = ", ".join(f"{n}: {entry.rates[n][-1]:.0f}" for n in HTTP_CLIENTS)
            say(f"{model}: HTTP visit {visit.number + 1} of {len(order)}: {name}, tokens/s by clients: {shown}")
    return entries


def ask(url: str, clients: int, requests: int, seed: int) -> dict[str, Any]:
    """What a client process measured. Raises RuntimeError with its last words if it failed."""
    command = [sys.executable, "-m", "loadtests.peers.client", url, "--clients", clients, "--requests", requests]
    command += ["--tokens", HTTP_TOKENS, "--seed", seed]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the client failed: {run.stderr.strip().splitlines()[-1:]}")
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer

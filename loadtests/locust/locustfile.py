"""What locust runs. The scenario is chosen by --scenario or the variable STET_SCENARIO; `steady` if by neither.

    locust -f loadtests/locust/locustfile.py --host http://127.0.0.1:8000 --headless --scenario burst

Each user streams, one request after the other. Beside the whole request, statistics of their own hold the time to the
first token, the time between tokens, the time per output token and tokens a second, by behaviour; refusals (429) have
one too, and are no failures. Only whole requests count in locust's totals.
"""

from __future__ import annotations

import os
import random
import sys
import time
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# Locust puts this file's folder on the path, and not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
from urllib.parse import urlsplit

from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.locust import report
from loadtests.locust.scenarios import SCENARIOS, Scenario, Thresholds, users_at
from loadtests.locust.stream import Address, Reply, WireError, exchange
from loadtests.machine import describe_host
from server.bench.dialect import DIALECTS, Ask, Dialect, Usage, error_of, read_event
from server.bench.wire import request_bytes
from server.bench.workload import text

SHARED_WORDS, LONG_SHARE, OUTPUT_TOKENS = 160, 0.6, 48
LIMITS = {"ttft_p99": "ms", "itl_p99": "ms", "failures": "share", "refused": "share", "cached": "share"}


@events.init_command_line_parser.add_listener
def _add_flags(parser: LocustArgumentParser) -> None:
    names = list(SCENARIOS)
    # These two can be chosen on locust's page as well: it shows what belongs to the parser itself, and to no group.
    parser.add_argument("--scenario", choices=names, default="steady", env_var="STET_SCENARIO", help="what users do")
    parser.add_argument("--api", choices=DIALECTS, default="chat", env_var="STET_API", help="what requests are sent to")
    group = parser.add_argument_group("Stet")
    group.add_argument("--report", default="", env_var="STET_REPORT", help="write the result to this file as Markdown")
    for name, unit in LIMITS.items():
        text = f"{unit}; instead of the scenario's own threshold"
        group.add_argument(f"--{name.replace('_', '-')}", type=float, default=None, help=text)


def options_of(environment: Environment) -> Namespace:
    """The flags. Raises RuntimeError where locust has parsed none, as when it is used as a library."""
    options: Namespace | None = environment.parsed_options
    if options is None:
        raise RuntimeError("this locustfile needs locust's command line")
    return options


def scenario_of(environment: Environment) -> Scenario:
    """What was chosen, its thresholds as the flags say."""
    options = options_of(environment)
    scenario = SCENARIOS[options.scenario]
    given = {name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None}
    return replace(scenario, thresholds=replace(scenario.thresholds, **given))


@events.init.add_listener
def _users_of_the_scenario(environment: Environment, **_: Any) -> None:
    """Before locust takes one user for its default; its page then proposes the scenario's number."""
    options = options_of(environment)
    if options.num_users is None:
        options.num_users = scenario_of(environment).users


def api_key() -> str | None:
    """From the file in STET_API_KEY_FILE, or the variable STET_BENCH_KEY."""
    path = os.environ.get("STET_API_KEY_FILE")
    return Path(path).read_text().strip() if path else os.environ.get("STET_BENCH_KEY")


class Server:
    """Where requests go, how they are written, and how many tokens the model's context has."""

    def __init__(self, url: str, api: str) -> None:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        self.address = Address(parts.hostname or "", parts.port or (443 if tls else 80), tls)
        self.key = api_key()
        info = self.get("/info")
        self.info = info.get("identity", {})
        listed = self.get("/v1/models").get("data") or [{}]
        self.dialect = Dialect(api, listed[0].get("id", ""))
        self.context = int(info.get("context_length") or listed[0].get("max_model_len") or 1024)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return request_bytes(method, path, f"{self.address.host}:{self.address.port}", body, headers)

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object, empty where the server has none."""
        reply = exchange(self.address, self.request("GET", path), seconds=10.0)
        found = json.loads(reply.body) if reply.status == 200 else {}
        return found if isinstance(found, dict) else {}


class SseUser(User):
    """Streams, and writes down what a reader notices."""

    def on_start(self) -> None:
        self.scenario = scenario_of(self.environment)
        self.rng = random.Random()
        self.server = Server(self.host or "", options_of(self.environment).api)

    def wait_time(self) -> float:
        return self.rng.uniform(*self.scenario.think)

    @task
    def act(self) -> None:
        mix = self.scenario.mix
        (name,) = self.rng.choices(list(mix), list(mix.values()))
        words = round(LONG_SHARE * self.server.context / 1.6) if name == "long" else self.rng.randint(8, 60)
        ask = Ask(text(words, self.rng), OUTPUT_TOKENS)
        if name == "shared":
            ask = replace(ask, system=text(SHARED_WORDS, random.Random(1)))
        leave_after = self.rng.randint(1, OUTPUT_TOKENS // 2) if name == "cancel" else None
        self.stream(name, ask, leave_after, pause=0.02 if name == "slow" else 0.0)

    def stream(self, name: str, ask: Ask, leave_after: int | None, pause: float) -> None:
        """One request from when it is due to its end, in the statistics."""
        began = time.perf_counter()
        times: list[float] = []
        usage, error, done = Usage(), "", False

        def on_event(data: bytes, now: float) -> bool:
            nonlocal usage, error, done
            event = read_event(data)
            if event.has_text:
                times.append(now)
            usage = event.usage or usage
            error = event.error or error
            done |= event.done
            return leave_after is not None and len(times) >= leave_after

        request = self.server.request("POST", self.server.dialect.path, self.server.dialect.body(ask))
        try:
            reply = exchange(self.server.address, request, on_event, pause=pause)
        except (OSError, WireError, ValueError) as raised:
            reply, error = Reply(), str(raised) or type(raised).__name__
        ended = time.perf_counter()
        if reply.status in (429, 503):
            self.log(report.REFUSED, name, 1e3 * (ended - began))
            time.sleep(min(1.0, float(reply.headers.get("retry-after", "1"))))
            return
        if reply.status not in (0, 200):
            error = f"{reply.status}: {_message(reply.body)}"
        elif not error and leave_after is None and not done:
            error = "the stream ended without [DONE]"
        if not error:
            self.measured(name, began, times, usage)
        self.environment.events.request.fire(
            request_type=report.WHOLE,
            name=name,
            response_time=1e3 * (ended - began),
            response_length=0,
            exception=RuntimeError(error) if error else None,
            context={},
        )

    def measured(self, name: str, began: float, times: list[float], usage: Usage) -> None:
        if not times:
            return
        self.log(report.TTFT, name, 1e3 * (times[0] - began))
        for before, after in pairwise(times):
            self.log(report.ITL, name, 1e6 * (after - before))
        tokens = usage.completion_tokens
        if tokens > 1 and times[-1] > times[0]:
            per_token = (times[-1] - times[0]) / (tokens - 1)
            self.log(report.TPOT, name, 1e6 * per_token)
            self.log(report.RATE, name, 1 / per_token)
        if usage.prompt_tokens:
            self.log(report.PROMPT, name, usage.prompt_tokens)
            self.log(report.CACHED, name, usage.cached_tokens)

    def log(self, kind: str, name: str, value: float) -> None:
        """Into a statistic of its own, outside locust's totals, which count requests."""
        self.environment.stats.get(name, kind).log(value, 0)


def _message(body: bytes) -> str:
    try:
        return error_of(json.loads(body))
    except (ValueError, AttributeError):
        return body[:200].decode(errors="replace")


class ScenarioShape(LoadTestShape):
    """Users as the scenario has them at each moment; --users and --run-time stretch it."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        if self.runner is None:
            return None
        environment = self.runner.environment
        scenario, options = scenario_of(environment), options_of(environment)
        seconds = float(options.run_time or scenario.seconds)
        users = users_at(scenario.stages(options.num_users or scenario.users, seconds), self.get_run_time())
        return None if users is None else (users, 100.0)


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    """Say which thresholds were not kept, write the report, and fail the run."""
    if isinstance(environment.runner, WorkerRunner):
        return
    options, scenario = options_of(environment), scenario_of(environment)
    if environment.stats.num_requests == 0 and not options.headless:
        return  # the page was opened, and nothing was started
    broken = report.failures(environment.stats, scenario.thresholds)
    for line in broken:
        print(f"threshold: {line}", file=sys.stderr)
    if broken:
        environment.process_exit_code = 1
    if not options.report:
        return
    try:
        server = Server(environment.host or "", options.api).info
    except (OSError, WireError, ValueError):
        server = {}
    heading = {
        "scenario": f"{options.scenario} ({scenario.what})",
        "command": "locust " + " ".join(sys.argv[1:]),
        "seconds": round((environment.stats.last_request_timestamp or 0) - environment.stats.start_time, 1),
        "thresholds": _named(scenario.thresholds),
    }
    page = report.markdown(environment.stats, heading, describe_host(), server, broken)
    Path(options.report).write_text(page, encoding="utf-8")


def _named(thresholds: Thresholds) -> str:
    pairs = ((name, getattr(thresholds, name)) for name in LIMITS)
    return f"of {thresholds.of}: " + ", ".join(f"{name} {value:g}" for name, value in pairs if value is not None)

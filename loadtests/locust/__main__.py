"""`make loadtest SCENARIO=steady`: a server of its own, a scenario against it, a report in build/loadtests.

Locust runs in a process of its own, because it replaces parts of the standard library by gevent's. What follows `--`
goes to locust as it is, after what is made here.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

from loadtests.locust.scenarios import SCENARIOS
from loadtests.processes import ROOT, running_server

OUT = ROOT / "build" / "loadtests"


def main(arguments: list[str] | None = None) -> int:
    names = "; ".join(f"{name}: {scenario.what}" for name, scenario in SCENARIOS.items())
    parser = argparse.ArgumentParser(prog="python -m loadtests.locust", description=__doc__, epilog=names)
    parser.add_argument("scenario", choices=list(SCENARIOS), nargs="?", default="steady")
    parser.add_argument(
        "--host", metavar="URL", help="a running server (default: one is started, with the embedded model)"
    )
    parser.add_argument("--serve", metavar="FLAGS", default="", help="of the server that is started, as one word")
    parser.add_argument(
        "--ui", action="store_true", help="locust's page on http://127.0.0.1:8089 instead of a headless run"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of SCENARIO.html and SCENARIO.md")
    flags, more = parser.parse_known_args(arguments)
    flags.out.mkdir(parents=True, exist_ok=True)
    page = flags.out / flags.scenario
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locust" / "locustfile.py")]
    command += ["--scenario", flags.scenario, "--report", f"{page}.md", "--html", f"{page}.html"]
    command += ["--web-host", "127.0.0.1"] if flags.ui else ["--headless", "--only-summary"]
    command += [argument for argument in more if argument != "--"]
    with contextlib.ExitStack() as stack:
        host = flags.host
        if host is None:
            server = stack.enter_context(running_server(flags.serve.split(), log=flags.out / "server.log"))
            server.wait_ready(600.0)
            host = server.url
        code = subprocess.run([*command, "--host", host], cwd=ROOT, check=False).returncode
    print(f"{page}.md\n{page}.html")
    return code


if __name__ == "__main__":
    sys.exit(main())

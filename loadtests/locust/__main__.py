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
PAGE = "http://127.0.0.1:8089"


def main(arguments: list[str] | None = None) -> int:
    names = "; ".join(f"{name}: {scenario.what}" for name, scenario in SCENARIOS.items())
    parser = argparse.ArgumentParser(prog="python -m loadtests.locust", description=__doc__, epilog=names)
    parser.add_argument("scenario", choices=list(SCENARIOS), nargs="?", default="steady")
    parser.add_argument(
        "--host", metavar="URL", help="a running server (default: one is started, with the embedded model)"
    )
    parser.add_argument("--serve", metavar="FLAGS", default="", help="of the server that is started, as one word")
    parser.add_argument(
        "--ui", action="store_true", help=f"locust's page on {PAGE} instead of a headless run; Ctrl-C ends it"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of SCENARIO.html and SCENARIO.md")
    flags, more = parser.parse_known_args(arguments)
    flags.out.mkdir(parents=True, exist_ok=True)
    page = flags.out / flags.scenario
    for ending in ("md", "html"):
        Path(f"{page}.{ending}").unlink(missing_ok=True)
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
        if flags.ui:
            print(f"Start on {PAGE}; Ctrl-C here ends locust and writes the report.", flush=True)
        code = _run([*command, "--host", host])
    # Where the page was opened and nothing started, there is no report.
    written = [path for path in (Path(f"{page}.md"), Path(f"{page}.html")) if path.exists()]
    print(*written, sep="\n")
    return code


def _run(command: list[str]) -> int:
    """Locust's exit code. Ctrl-C reaches it too, and is how its page is ended: its report is waited for."""
    with subprocess.Popen(command, cwd=ROOT) as locust:
        while True:
            try:
                return locust.wait()
            except KeyboardInterrupt:
                continue


if __name__ == "__main__":
    sys.exit(main())

"""Start a real server, and let each client of `smoke.py` talk to it: `python -m tests.clients CLIENTS_PYTHON`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loadtests.processes import running_server


def main(python: str) -> int:
    with running_server() as server:
        server.wait_ready()
        url = f"http://{server.host}:{server.port}"
        return subprocess.run(
            [python, str(Path(__file__).parent / "smoke.py"), url], timeout=120, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

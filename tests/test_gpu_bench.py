"""The GPU's benchmark, run on a tiny model on whatever device is there."""

from __future__ import annotations

import json
import subprocess
import sys

SMOKE = """
import sys
for name in ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"): sys.modules[name] = None
from loadtests.gpu_bench import main
sys.exit(main(["--smoke"]))
"""


def test_it_runs_without_the_servers_other_packages_and_ends_with_one_json_line() -> None:
    run = subprocess.run([sys.executable, "-c", SMOKE], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    ours = [
        row for row in result["rows"] if row["engine"] == "stet" and row["deterministic"] and row["weights"] == "none"
    ]
    peers = [row for row in result["rows"] if row["engine"] == "transformers generate"]
    assert [row["batch"] for row in ours] == [row["batch"] for row in peers] == [1, 3]
    assert all(row["decode_tokens_per_s"] > 0 and row["share_of_roofline"] > 0 for row in ours)
    assert "| smoke | stet |" in run.stdout

"""`stet bench`, locust and the soak, against a real server: processes of their own, as a person runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from loadtests import soak
from loadtests.processes import ROOT, RunningServer
from tests.end_to_end.client import metrics


def stet(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_bench_counts_what_the_server_counts(server: RunningServer, tmp_path: Path) -> None:
    """Every dialect; the tokens of all requests are those of the server's own counters."""
    for api in ("generate", "completions", "chat"):
        names = ("stet_generated_tokens_total", "stet_prompt_tokens_total", "stet_cached_prompt_tokens_total")
        before = metrics(server)
        load = ["--rate", "20", "--arrivals", "constant", "--duration", "500ms", "--warmup", "0"]
        shape = ["--prompt-tokens", "40:0.5", "--output-tokens", "12:0.5", "--system-tokens", "48"]
        out = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg"), "--ttft-limit", "60s"]
        done = stet("bench", f"{server.url}/v1/", "--api", api, *load, *shape, *out)
        assert done.returncode == 0, done.stderr
        assert "10 due in 0.5 s, 10 completed, 0 refused, 0 failed" in done.stdout
        found = json.loads((tmp_path / "out.json").read_text())
        result = found["result"]
        after = metrics(server)
        generated, prompts, cached = (after[name] - before[name] for name in names)
        lengths = result["lengths"]
        # And one request before, for the tokens of a word: two tokens out.
        assert 10 * lengths["output_tokens"]["mean"] + 2 == pytest.approx(generated)
        assert cached == pytest.approx(lengths["cached_prompt_share"] * 10 * lengths["prompt_tokens"]["mean"])
        assert cached > 0  # of the shared beginning
        # Computed or cached, and the first request's 204 words.
        assert prompts + cached > 10 * lengths["prompt_tokens"]["mean"] + 204 > 800
        assert result["rates"]["good_share"] == 1.0
        assert result["latency_s"]["ttft"]["count"] == 10
        assert found["server"]["api"] == api
        assert found["server"]["weights_hash"]
        assert ElementTree.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")


def test_bench_says_what_is_wrong_in_a_line() -> None:
    for arguments, words in (
        (["http://127.0.0.1:9"], "refused"),
        (["ftp://x"], "is not an address such as"),
        (["http://127.0.0.1:9", "--rate", "0"], "a number above 0"),
        (["http://127.0.0.1:9", "--duration", "0s"], "a time above 0"),
    ):
        done = stet("bench", *arguments)
        assert done.returncode == 2
        assert words in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


def locust(server: RunningServer, report: Path, *flags: str) -> subprocess.Popen[str]:
    """As the compose file starts it, with nothing but what its image holds."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'msgspec', 'fastapi', 'uvloop', 'httptools')))"
    command = [sys.executable, "-c", f"{blocked}; from locust.main import main; main()", "-f"]
    command += ["loadtests/locust/locustfile.py", "--host", server.url, "--headless", "--only-summary"]
    command += ["--report", str(report), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_locust_measures_and_fails_what_does_not_keep_its_thresholds(server: RunningServer, tmp_path: Path) -> None:
    before = metrics(server)
    kept = locust(
        server, tmp_path / "kept.md", "--scenario", "shared", "--run-time", "3", "--html", str(tmp_path / "h")
    )
    broken = locust(server, tmp_path / "broken.md", "--scenario", "soak", "--run-time", "3", "--ttft-p99", "0.01")
    output = [process.communicate(timeout=60)[0] for process in (kept, broken)]
    page = (tmp_path / "kept.md").read_text()
    assert kept.returncode == 0, output[0]
    assert "All thresholds were kept." in page
    for words in ("- processor: ", "- model: stet-tales", "- scenario: shared"):
        assert words in page
    counts = {what: int(n) for what, n in re.findall(r"^\| shared \| ([^|,]+)[^|]* \| (\d+)", page, re.MULTILINE)}
    requests = counts["whole request"]
    assert requests == counts["TTFT"] == counts["per token"] == counts["tokens/s"] > 5
    # 48 tokens each; a token that is no text yet has no event of its own.
    assert 0.8 * 47 * requests < counts["inter-token"] <= 47 * requests
    assert (tmp_path / "h").read_text().count("TTFT") > 0
    assert broken.returncode == 1, output[1]
    assert re.search(r"threshold: the 99th percentile of TTFT of chat is .* ms: at most 0.01", output[1])
    verdict = (tmp_path / "broken.md").read_text().partition("Not kept:")[2].strip()
    assert len(verdict.splitlines()) == 1
    after = metrics(server)
    cancelled = 'stet_requests_total{endpoint="/v1/chat/completions",outcome="cancelled"}'
    assert after[cancelled] > before[cancelled]


def test_a_short_soak_leaves_nothing_behind() -> None:
    result = soak.run(2.5, 0.5)
    # How much memory grows in so short a time says nothing.
    assert [text for text in result["failures"] if "memory" not in text] == []
    assert result["blocks_used"] == 0
    assert result["requests"]["completed"] > 10
    assert result["requests"]["left"] > 5
    assert result["tasks"]
    assert ElementTree.fromstring(soak.plot(result)).tag.endswith("svg")


def test_a_soak_sees_what_grows() -> None:
    steady = [soak.Sample(15.0 * n, 400 << 20, 40, 20, 9) for n in range(240)]
    assert soak.judge(steady, 3600.0) == []
    grown = [soak.Sample(s.at, s.memory + round(s.at / 3600 * (6 << 20)), 40, 20, 9) for s in steady]
    assert ["1.49% an hour" in text for text in soak.judge(grown, 3600.0)] == [True]
    assert soak.slope(soak.settled_samples(grown, 3600.0)) == pytest.approx(6 / 403.5, rel=1e-3)
    for name in ("descriptors", "threads", "tasks"):
        leaking = [soak.Sample(**{**soak.asdict(s), name: 40 + n // 60}) for n, s in enumerate(steady)]
        assert [text.split(":")[0] for text in soak.judge(leaking, 3600.0)] == [name]

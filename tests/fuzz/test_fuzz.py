"""The short version of `make fuzz`: no answer but declared ones, none late, and nothing left at the end."""

from __future__ import annotations

from pathlib import Path

from loadtests.processes import running_server
from tests.fuzz.campaign import FLAGS, run_campaign


def test_nothing_that_is_sent_hurts_the_server(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_server(FLAGS, log=log) as server:
        server.wait_ready()
        report = run_campaign(server, 450, seed=20261124, slow_patience=1.0)
    report.check_log(log.read_text())
    assert not report.failures, report.text()
    assert report.kinds.total() > 350
    assert report.statuses[200] > 50, report.text()
    assert {400, 404} <= report.statuses.keys(), report.text()

"""Prometheus' files and the dashboard, against the real server and the real Prometheus."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from deploy.grafana.dashboard import text as dashboard_text
from tests.deploy import files
from tests.deploy.conftest import Prometheus, Running, local_config, program

EXPRESSIONS = [*files.queries().values(), *(rule["expr"] for rule in files.rules())]
SELECTOR = re.compile(r"(stet_\w+|up)(\{[^}]*\})?")
# What Prometheus 3 sends: it would take names in UTF-8.
ACCEPT_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def promtool(*arguments: str | Path, given: bytes = b"") -> str:
    done = subprocess.run([program("promtool"), *arguments], input=given, capture_output=True)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_the_configuration_and_the_rules_are_good(tmp_path: Path) -> None:
    (tmp_path / "prometheus_key").write_text("key")
    config = tmp_path / "prometheus.yml"
    config.write_text(local_config(tmp_path, "127.0.0.1:8000"))
    promtool("check", "config", "--lint=all", "--lint-fatal", config)
    promtool("check", "rules", "--lint=all", "--lint-fatal", *(files.DEPLOY / "prometheus" / "rules").glob("*.yml"))


def test_the_rules_unit_tests() -> None:
    with ThreadPoolExecutor() as pool:
        cases = sorted((files.DEPLOY / "prometheus" / "tests").glob("*.yml"))
        said = list(pool.map(lambda case: promtool("test", "rules", case), cases))
    assert len(said) == 4
    assert all("SUCCESS" in each for each in said)


def test_the_windows_are_those_of_the_names_and_the_budgets_are_burnt_as_written() -> None:
    """Of a burn rate each factor, window and `and` matters, and no unit test could try every one of them."""
    expressions = {rule.get("alert") or rule["record"]: " ".join(rule["expr"].split()) for rule in files.rules()}
    for name, expression in expressions.items():
        if window := re.search(r":rate(\w+)$", name):
            assert set(re.findall(r"\[(\w+)\]", expression)) == {window[1]}, name
    objectives = {
        "StetErrors": ("stet:error_ratio", "0.001"),
        "StetSlowFirstToken": ("stet:slow_first_token_ratio", "0.01"),
        "StetSlowTokens": ("stet:slow_inter_token_ratio", "0.01"),
    }
    for alert, (ratio, budget) in objectives.items():
        fast, faster = f"> 6 * {budget}", f"> 14.4 * {budget}"
        assert expressions[f"{alert}BurnFast"] == (
            f"{ratio}:rate1h {faster} and {ratio}:rate5m {faster} or {ratio}:rate6h {fast} and {ratio}:rate30m {fast}"
        )
        assert expressions[f"{alert}BurnSlow"] == f"{ratio}:rate3d > {budget} and {ratio}:rate6h > {budget}"


def test_every_alert_has_a_unit_test_and_a_page_in_the_runbook() -> None:
    tested = "".join(file.read_text() for file in (files.DEPLOY / "prometheus" / "tests").glob("*.yml"))
    runbook = (files.ROOT / "docs" / "operations.md").read_text()
    for rule in files.rules():
        if name := rule.get("alert"):
            assert f'alertname="{name}", alertstate="firing"' in tested or f"alertname: {name}" in tested
            assert f"\n#### {name}\n" in runbook
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
            assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_metrics_are_clean(running: Running) -> None:
    running.generate(prompt="A fox", max_new_tokens=4)
    answer = running.get("/metrics", running.metrics)
    assert answer.status_code == 200
    promtool("check", "metrics", given=answer.content)
    assert running.get("/metrics", running.infer).status_code == 403


def test_prometheus_3_gets_what_it_can_read(running: Running) -> None:
    answer = running.get("/metrics", running.metrics, accept=ACCEPT_3)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")


def test_prometheus_scrapes_with_its_key(prometheus: Prometheus) -> None:
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


@pytest.mark.parametrize("panel", files.queries())
def test_every_panel_shows_something(panel: str, prometheus: Prometheus) -> None:
    assert prometheus.numbers(files.queries()[panel])


@pytest.mark.parametrize("rule", files.rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_has_a_value(rule: dict[str, str], prometheus: Prometheus) -> None:
    expression = files.without_thresholds(rule["expr"])
    assert ("alert" in rule) == (expression != rule["expr"])
    assert prometheus.numbers(expression)
    if "record" in rule:
        assert prometheus.numbers(rule["record"])


def test_prometheus_evaluates_every_rule_and_none_fires(prometheus: Prometheus) -> None:
    found = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(files.rules())
    assert {rule["health"] for rule in found} == {"ok"}
    assert [rule["name"] for rule in found if rule.get("state", "inactive") == "firing"] == []


def test_every_series_that_is_asked_for_is_there(running: Running, prometheus: Prometheus) -> None:
    """An alternative of a label that no series has would be a silent hole in a panel or an alert."""
    exposed = set(re.findall(r"^# TYPE (\w+)", running.get("/metrics", running.metrics).text, re.MULTILINE))
    asked = {selector for expression in EXPRESSIONS for selector in SELECTOR.findall(expression)}
    assert len(asked) > 40
    for name, labels in asked:
        assert name == "up" or re.sub(r"_(bucket|count|sum)$", "", name) in exposed | {name} & exposed, name
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', labels):
            for alternative in value.split("|") if operator == "=~" else [value]:
                if name != "stet_kernel_fallback_total":  # has series once there was one
                    assert prometheus.values(f'{name}{{{label}{operator}"{alternative}"}}'), f"{name} {alternative}"


def test_the_dashboard_is_what_its_code_makes() -> None:
    assert (files.DEPLOY / "grafana" / "dashboards" / "stet.json").read_text() == dashboard_text()


def test_the_dashboard_is_whole() -> None:
    dashboard = files.dashboard()
    panels = dashboard["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert [row.split()[-1] for row in rows] == ["healthy?", "waiting?", "go?", "it?", "doing?"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    used = set(re.findall(r"\$\{?(\w+)", (files.DEPLOY / "grafana" / "dashboards" / "stet.json").read_text()))
    assert used - {"__rate_interval", "__all"} == set(variables)


def test_grafana_is_told_of_prometheus_and_the_dashboard() -> None:
    services = files.compose()["services"]
    provisioning = files.DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    scraped = yaml.safe_load((files.DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "stet.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/stet.json"

"""The dashboard as code: `python deploy/grafana/dashboard.py` writes dashboards/stet.json, which Grafana loads.

Five questions, top to bottom: is it healthy, are users waiting, where does the time go, what limits it, what is it
doing. A panel is a line here; a test says when the file is not what this makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "stet.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24

# What a panel's queries look at: the servers that were chosen above the dashboard.
S = 'job=~"$job", instance=~"$instance"'
RATE = "[$__rate_interval]"

Json = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One panel. queries: PromQL and legend of each. unit: Grafana's name of it. stack: the series add up.

    limits: values from which on a number is (yellow, red); red below yellow means that less is worse.
    """

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stack: bool = False
    limits: tuple[float, float] | None = None
    options: Json = field(default_factory=dict)


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """The rate of a counter over the chosen servers."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({metric}{{{labels}{', ' if labels else ''}{S}}}{RATE}))"


def quantile(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', 'le')})"


def mean(histogram: str) -> str:
    return f"{rate(histogram + '_sum')} / {rate(histogram + '_count')}"


def quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(share, histogram), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99))


def now(metric: str, how: str = "sum", by: str = "") -> str:
    grouped = f"{how} by ({by}) " if by else how
    return f"{grouped}({metric}{{{S}}})"


def objective(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((f'max(stet:{name}_ratio:rate{window}{{job=~"$job"}})', window) for window in ("5m", "1h", "6h"))


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Is it healthy?",
        (
            Panel("Servers that answer", "Whether Prometheus can read /metrics, by server.",
                  ((f"up{{{S}}}", "{{instance}}"),), kind="stat", width=4, limits=(1, 1)),
            Panel("Engine ready", "1 while the engine is warm and connected; 0 while it loads, restarts or has failed.",
                  (("stet_engine_up{" + S + "}", "{{instance}}"),), kind="stat", width=4, limits=(1, 1)),
            Panel("Age of the last step", "How long an engine with work has not finished a step; 0 when idle.",
                  ((now("stet_engine_last_step_age_seconds", "max"), ""),), "s", "stat", 4, limits=(10, 30)),
            Panel("Engine restarts, 1 h", "Engines that were lost and started again.",
                  ((f"sum(increase(stet_engine_restarts_total{{{S}}}[1h]))", ""),), "short", "stat", 4, limits=(1, 2)),
            Panel("Failing requests", "Share of the admitted requests that ended with a fault of the server, 5 min.",
                  (('max(stet:error_ratio:rate5m{job=~"$job"})', ""),),
                  "percentunit", "stat", 4, limits=(0.001, 0.0144)),
            Panel("Alerts firing", "Alerts of deploy/prometheus/rules/alerts.yml that fire now: docs/operations.md.",
                  (('count(ALERTS{alertname=~"Stet.*", alertstate="firing"}) or vector(0)', ""),),
                  kind="stat", width=4, limits=(1, 1)),
            Panel("What is served", "Version, model and how it is computed.",
                  (("stet_build_info{" + S + "}", ""),), kind="table", width=16),
            Panel("Error budget burnt", "Failing requests, by window; the objective is 0.1 %.",
                  objective("error"), "percentunit", width=8),
        ),
    ),
    (
        "Are users waiting?",
        (
            Panel("Requests", "Running hold KV blocks in the engine; waiting are in its queue.",
                  ((now("stet_requests_running"), "running"), (now("stet_requests_waiting"), "waiting")), stack=True),
            Panel("Time to first token", "From a request's arrival to its first token.",
                  quantiles("stet_time_to_first_token_seconds"), "s"),
            Panel("Between tokens", "Between two tokens of one request.",
                  quantiles("stet_inter_token_latency_seconds"), "s"),
            Panel("First tokens after 2.5 s", "Share of the requests, by window; the objective is 1 %.",
                  objective("slow_first_token"), "percentunit"),
            Panel("Tokens after 0.1 s", "Share of the tokens, by window; the objective is 1 %.",
                  objective("slow_inter_token"), "percentunit"),
            Panel("Refused: the queue is full", "Share of all requests that got 429 queue_full.",
                  (('max(stet:refused_ratio:rate5m{job=~"$job"})', "5m"),), "percentunit"),
            Panel("Time to first token, all of it", "How the times are spread, which quantiles hide.",
                  ((rate("stet_time_to_first_token_seconds_bucket", "le"), "{{le}}"),), "s", "heatmap", 12),
            Panel("Whole requests", "From arrival to the terminal event.",
                  quantiles("stet_request_duration_seconds"), "s", width=12),
        ),
    ),
    (
        "Where does the time go?",
        (
            Panel("A mean request", "Queue: until the first step that computes for it. Prefill: until the first token. "
                  "Decode: until the last.",
                  tuple((mean(f"stet_request_{name}_seconds"), name) for name in ("queue", "prefill", "decode")),
                  "s", stack=True),
            *(Panel(name.capitalize(), text, quantiles(f"stet_request_{name}_seconds"), "s") for name, text in (
                ("queue", "From arrival to the first step that computed for it."),
                ("prefill", "From the first step to the first token."),
                ("decode", "From the first token to the last."),
            )),
            Panel("Time per output token", "Mean time between the tokens of one request.",
                  quantiles("stet_time_per_output_token_seconds"), "s"),
            Panel("HTTP", "From a request's headers to the last byte of its answer, mean by route.",
                  ((f"{rate('stet_http_request_duration_seconds_sum', 'route')} / "
                    f"{rate('stet_http_request_duration_seconds_count', 'route')}", "{{route}}"),), "s"),
        ),
    ),
    (
        "What limits it?",
        (
            Panel("KV blocks", "Used are held by requests; cached hold prefixes and go when others need them.",
                  ((now("stet_kv_cache_blocks", "sum", "state"), "{{state}}"),), stack=True),
            Panel("KV cache in use", "Share of the blocks that requests hold. Near 1, requests are preempted.",
                  ((now("stet_kv_cache_usage_ratio", "max"), "fullest server"),), "percentunit"),
            Panel("Preemptions", "Running requests that gave their blocks back, and the tokens computed again for it.",
                  ((rate("stet_preemptions_total"), "preemptions"),
                   (rate("stet_recomputed_tokens_total"), "tokens recomputed")), "ops"),
            Panel("Engine busy", "Share of the time in which the engine computes. Near 1, it is the limit.",
                  ((f"{rate('stet_engine_step_duration_seconds_sum')} / count(stet_engine_up{{{S}}})", "busy"),),
                  "percentunit"),
            Panel("Duration of a step", "What a token of every stream waits for.",
                  quantiles("stet_engine_step_duration_seconds"), "s"),
            Panel("Tokens of a step", "Prompt and decode tokens computed together. Small steps waste the weights' way.",
                  ((mean("stet_engine_step_tokens"), "mean"), *quantiles("stet_engine_step_tokens"))),
            Panel("Memory", "What the engine has planned for, by kind.",
                  ((now("stet_memory_bytes", "sum", "kind"), "{{kind}}"),), "bytes", stack=True),
            Panel("Slower paths", "Operators that took a slower path than their usual one, in all.",
                  (("sum by (op) (stet_kernel_fallback_total{" + S + "}) or vector(0)", "{{op}}"),)),
            Panel("Refusals for room", "Requests that found no place, or could not keep their deadline.",
                  ((rate("stet_requests_total", "outcome", 'outcome=~"queue_full|rate_limited|deadline"'),
                    "{{outcome}}"),), "reqps"),
        ),
    ),
    (
        "What is it doing?",
        (
            Panel("Tokens", "What the steps computed, and the prompt tokens that the cache spared them.",
                  tuple((rate(f"stet_{name}_tokens_total"), name.replace("_", " "))
                        for name in ("prompt", "cached_prompt", "generated", "recomputed")), "ops", stack=True),
            Panel("Discarded tokens", "Computed and not delivered, by reason.",
                  ((rate("stet_discarded_tokens_total", "reason"), "{{reason}}"),), "ops"),
            Panel("Prefix cache hits", "Share of the prompt tokens looked up that were found.",
                  ((f"{rate('stet_prefix_cache_hit_tokens_total')} / {rate('stet_prefix_cache_queried_tokens_total')}",
                    "hits"),), "percentunit"),
            Panel("Requests by outcome", "A finish reason, or the code of a refusal.",
                  ((rate("stet_requests_total", "outcome") + " > 0", "{{outcome}}"),), "reqps", stack=True),
            Panel("Requests by endpoint", "Which dialect is spoken.",
                  ((rate("stet_requests_total", "endpoint"), "{{endpoint}}"),), "reqps", stack=True),
            Panel("HTTP by status", "All routes; 499 is a client that left before its answer.",
                  ((rate("stet_http_requests_total", "status"), "{{status}}"),), "reqps", stack=True),
            Panel("Length of prompts", "Tokens of a request's prompt.", quantiles("stet_request_prompt_tokens")),
            Panel("Length of outputs", "Tokens delivered to a request.", quantiles("stet_request_generated_tokens")),
            Panel("API keys", "Keys in force, and files of keys that could not be used in the last hour.",
                  ((now("stet_api_keys", "max"), "in force"),
                   (f'sum(increase(stet_api_key_reloads_total{{outcome="refused", {S}}}[1h]))', "refused files"))),
        ),
    ),
)  # fmt: skip


def panel_json(panel: Panel, number: int, x: int, y: int, height: int) -> Json:
    """A panel as Grafana stores it."""
    instant = panel.kind in ("stat", "table")
    targets = [
        {
            "refId": "ABCDEFGH"[index],
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend or "__auto",
            "range": not instant,
            "instant": instant,
            "exemplar": panel.kind == "timeseries" and "_bucket" in expression,
            **({"format": "table"} if panel.kind == "table" else {}),
            **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
        }
        for index, (expression, legend) in enumerate(panel.queries)
    ]
    defaults: Json = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 25 if panel.stack else 8,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none"},
        }
    if panel.limits is not None:
        yellow, red = panel.limits
        good, bad = ("red", "green") if panel.title in ("Servers that answer", "Engine ready") else ("green", "red")
        steps: list[Json] = [{"color": good, "value": None}, {"color": bad, "value": red}]
        if yellow != red:
            steps.insert(1, {"color": "yellow", "value": yellow})
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    options: dict[str, Json] = {
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "stat": {"colorMode": "background", "graphMode": "none", "reduceOptions": {"calcs": ["lastNotNull"]}},
        "table": {"showHeader": True},
        "heatmap": {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"scheme": "Blues", "mode": "scheme"}},
    }
    made: Json = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options[panel.kind],
    }
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
        made["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return made


def variables() -> list[Json]:
    """What is chosen above the dashboard: the data source, the job, its servers."""
    datasource: Json = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}

    def labels(name: str, label: str, query: str) -> Json:
        return {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }

    return [
        datasource,
        labels("job", "Job", "label_values(stet_build_info, job)"),
        labels("instance", "Server", 'label_values(stet_build_info{job=~"$job"}, instance)'),
    ]


def dashboard() -> Json:
    """The whole of it."""
    panels: list[Json] = []
    y = 0
    for title, row in ROWS:
        panels.append({
            "id": len(panels) + 1,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            "panels": [],
        })  # fmt: skip
        y += 1
        x = 0
        height = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
                height = 0
            height = max(height, 4 if panel.kind == "stat" else 8)
            panels.append(panel_json(panel, len(panels) + 1, x, y, height))
            x += panel.width
        y += height
    return {
        "uid": "stet",
        "title": "Stet",
        "description": "Is it healthy, are users waiting, where does the time go, what limits it, what is it doing.",
        "tags": ["stet"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": [restarts()]},
        "panels": panels,
    }


def restarts() -> Json:
    """A mark on every panel where an engine was started again."""
    return {
        "name": "Engine restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": f"changes(stet_engine_restarts_total{{{S}}}[1m]) > 0",
        "titleFormat": "Engine restarted",
        "textFormat": "{{instance}}",
    }


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
    print(OUT)

"""Bodies made from the server's own OpenAPI document: valid ones, and ones that break it in one place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import schemathesis
import schemathesis.transport.requests
from hypothesis import given
from schemathesis import GenerationMode

from loadtests.processes import RunningServer
from tests.fuzz.examples import examples

if TYPE_CHECKING:
    from tests.fuzz.campaign import Report


def send_bodies(
    server: RunningServer, report: Report, num_requests: int, number: int, say: Callable[[str], None]
) -> None:
    """Send so many requests, spread over the routes: every answer must be one that the document declares for it."""
    document = json.loads(server.get("/openapi.json")[1])
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # Routes without a body have little to be tried: a case each in twenty.
    posts = [operation for operation in operations if operation.method == "post"]
    plain = [operation for operation in operations if operation.method != "post"]
    each = max(1, num_requests * 19 // 20 // (len(modes) * len(posts)))
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        for operation in plain:
            _send(operation, GenerationMode.POSITIVE, max(1, num_requests // 20 // len(plain)), number, client, report)
        for operation in posts:
            for mode in modes:
                _send(operation, mode, each, number, client, report)
            say(f"{operation.label}: {report.kinds.total()} sent, slowest {report.slowest:.2f} s")


def _send(operation: Any, mode: Any, count: int, number: int, client: Any, report: Report) -> None:
    @examples(count, number)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        sent = case.as_transport_kwargs(base_url=str(client.base_url))
        body = sent.get("json", sent.get("data"))
        if mode is GenerationMode.POSITIVE and isinstance(body, dict) and len(body) % 3:
            body = _one_prompt(operation.path, body)
        content = body if isinstance(body, bytes | str | None) else json.dumps(body)
        headers = {"content-type": "application/json"} if content is not None else {}
        report.sent(f"{mode.value} bodies")
        what = f"{operation.label} {content!r:.400}"
        began = time.monotonic()
        answer = client.request(operation.method.upper(), sent["url"], content=content, headers=headers)
        report.answered(answer.status_code, time.monotonic() - began, what)
        _check(operation, answer, what, report)

    send()


def _one_prompt(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with exactly one prompt, which the document cannot ask for; so that some get through to the engine."""
    names = {"/generate": ("prompt", "prompt_token_ids", "messages"), "/tokenize": ("prompt", "messages")}.get(path, ())
    given = [name for name in names if body.get(name) is not None]
    kept = {name: value for name, value in body.items() if name not in given[1:] and name != "model"}
    return kept if given or not names else {**kept, "prompt": "Once upon a time"}


def _check(operation: Any, answer: Any, what: str, report: Report) -> None:
    """The status and the kind of content are declared, and an error has its shape."""
    responses = operation.definition.raw["responses"]
    declared = responses.get(str(answer.status_code))
    if declared is None:
        report.fail(f"status {answer.status_code} is not declared: {what}")
        return
    kind = answer.headers.get("content-type", "").split(";")[0]
    if kind not in declared["content"]:
        report.fail(f"{kind} is not declared for {answer.status_code}: {what}")
    if answer.status_code >= 400 and "error" not in answer.json() and operation.path not in ("/readyz", "/health"):
        report.fail(f"an error without its shape: {what}")
    if answer.status_code in (429, 503) and "retry-after" not in answer.headers:
        report.fail(f"{answer.status_code} without Retry-After: {what}")

"""Every error in one shape: what a code's status is, and how problems become a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from server.generation import Problem, Refusal

# 4xx are the client's to repair, 5xx the server's; 429 and 503 say when to come back.
STATUS = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "unsupported_grammar": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "too_large": 413,
    "unsupported_media_type": 415,
    "headers_too_large": 431,
    "queue_full": 429,
    "rate_limited": 429,
    "internal": 500,
    "unsupported": 501,
    "loading": 503,
    "draining": 503,
    "engine_restarting": 503,
    "deadline": 504,
}
INTERNAL_MESSAGE = "An internal error occurred. The server's log has the cause under this request's X-Request-Id."

# When the one who refuses does not know better: seconds after which a retry is worth making.
_DEFAULT_RETRY_AFTER = {"queue_full": 1, "loading": 2, "draining": 5, "engine_restarting": 2}
_MAX_VALUE_CHARS = 64
_MAX_DETAILS = 64

_encode = msgspec.json.Encoder().encode


class HttpError(Exception):
    """A request that the HTTP layer itself refuses. `code` is a key of STATUS; `headers` go out with the answer."""

    def __init__(self, code: str, problems: Sequence[Problem], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problems[0].message)
        self.code = code
        self.problems = list(problems)
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client closed the connection before its request was complete: there is nobody to answer."""


def clip(value: Any) -> Any:
    """What the client sent, short enough to send back: a JSON scalar as it is, anything longer as clipped text."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return value
        digits = value.bit_length()
        return f"an integer of about {int(digits * 0.30103) + 1} digits"
    text = value if isinstance(value, str) else _compact(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "…"


def _compact(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object of {len(value)} members"
    if isinstance(value, Sequence):
        return f"an array of {len(value)} items"
    return type(value).__name__


def error_object(code: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """The `error` member of a body: the first problem is its message and param, all are its details."""
    first = problems[0]
    status = STATUS[code]
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    else:
        kind = "invalid_request_error"
    details = [
        {"param": problem.param, "message": problem.message, "value": clip(problem.value), "allowed": problem.allowed}
        for problem in problems[:_MAX_DETAILS]
        if problem.param is not None
    ]
    return {"message": first.message, "type": kind, "param": first.param, "code": code, "details": details}


def error_body(code: str, problems: Sequence[Problem]) -> bytes:
    """The whole JSON body of an error answer."""
    return _encode({"error": error_object(code, problems)})


def error_response(
    code: str, problems: Sequence[Problem], headers: Mapping[str, str] | None = None, retry_after: int | None = None
) -> Response:
    """An error answer, with Retry-After (whole seconds, at least 1) where waiting helps."""
    sent = dict(headers or {})
    wait = retry_after if retry_after is not None else _DEFAULT_RETRY_AFTER.get(code)
    if wait is not None:
        sent["retry-after"] = str(max(1, wait))
    if code in ("unsupported", "deadline"):
        # OpenAI's clients try every 5xx again; these stay what they are: the time is over, too.
        sent["x-should-retry"] = "false"
    return Response(error_body(code, problems), STATUS[code], sent, "application/json")


def refusal_response(refusal: Refusal) -> Response:
    """The answer to a request that the service refused before its first event."""
    return error_response(refusal.code, refusal.problems, retry_after=refusal.retry_after)


def internal_problem() -> Problem:
    """What a client is told about a defect: nothing but that there is one."""
    return Problem(None, INTERNAL_MESSAGE)

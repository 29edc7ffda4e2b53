"""What a request may cost before it is understood: bytes, seconds, and JSON that is exactly JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive

from server.generation import Problem
from server.http.errors import ClientGone, HttpError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a connection, and one of all together. Seconds and bytes; the defaults are those of docs/api.md.

    max_head_bytes     request line and headers
    max_body_bytes     the body, declared or received
    max_intake_bytes   all bodies together that have begun to arrive and are not complete
    receipt_seconds    for the head, and again for the body, to arrive
    admission_seconds  a stream's headers go out after this long in the queue, if its first token has not come
    keep_alive_seconds of silence after which a stream says that it lives
    stall_seconds      a reader that takes nothing for this long is cut off
    """

    max_head_bytes: int = 16 * 1024
    max_body_bytes: int = 1024 * 1024
    max_intake_bytes: int = 64 * 1024 * 1024
    receipt_seconds: float = 10.0
    admission_seconds: float = 10.0
    keep_alive_seconds: float = 15.0
    stall_seconds: float = 30.0


MAX_DEPTH = 32

# A whole string, a bracket, or a quote that opens a string without an end. Possessive: nothing is tried twice.
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """Raised inside the JSON decoder's hooks; carries the problem out."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


async def read_body(headers: Headers, receive: Receive, limits: Limits) -> bytes:
    """The request's body, which must be declared as JSON.

    Raises HttpError: 415 for another content type, 413 above the limit (before anything is buffered where the length
    is declared), 408 when it takes too long. Raises ClientGone when the connection ends first.
    """
    _check_content_type(headers)
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.max_body_bytes:
        raise _too_large(limits)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.receipt_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk: bytes = message.get("body", b"")
                size += len(chunk)
                if size > limits.max_body_bytes:
                    raise _too_large(limits)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        text = f"The body did not arrive within {limits.receipt_seconds:g} seconds."
        raise HttpError("timeout", [Problem(None, text)], {"connection": "close"}) from None


def _check_content_type(headers: Headers) -> None:
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        text = "The body must be sent as UTF-8 JSON: add the header 'Content-Type: application/json'."
        raise HttpError("unsupported_media_type", [Problem(None, text)])
    if headers.get("content-encoding", "identity").lower() != "identity":
        text = "A compressed body is not accepted: send it without Content-Encoding."
        raise HttpError("unsupported_media_type", [Problem(None, text)])


def _too_large(limits: Limits) -> HttpError:
    text = f"The body is larger than the limit of {limits.max_body_bytes} bytes."
    return HttpError("too_large", [Problem(None, text)])


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, read strictly. Raises HttpError (400), never anything else.

    Refused: bytes that are not UTF-8, duplicate keys, NaN and Infinity, numbers beyond a double or of thousands of
    digits, lone surrogates, nesting deeper than MAX_DEPTH, and anything but an object at the top.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"The body is not valid UTF-8 (byte {error.start}).") from None
    if not text.strip():
        raise _invalid("The body is empty: send a JSON object.")
    _check_depth(text)
    objects = _Objects()
    try:
        value = json.loads(
            text,
            object_pairs_hook=objects,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except _Refused as error:
        raise HttpError("invalid_request", [error.problem]) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _invalid(f"The body is not valid JSON: {error.msg} ({where}).") from None
    if not isinstance(value, dict):
        raise _invalid("The body must be a JSON object.")
    objects.check()
    # Only an escape can bring in a surrogate, since the bytes were UTF-8: most bodies need no walk.
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value, "")
    return value


def _invalid(message: str) -> HttpError:
    return HttpError("invalid_request", [Problem(None, message)])


def _check_depth(text: str) -> None:
    """One pass over the brackets outside strings, before a recursive decoder sees them.

    Counting them all, inside strings too, takes a hundredth of that, and is enough for most bodies: the pass over a
    string of a MiB is 5 ms in which no other thread runs.
    """
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRUCTURE.finditer(text):
        token = match[0]
        if token in ("{", "["):
            depth += 1
            if depth > MAX_DEPTH:
                raise _invalid(f"The body is nested deeper than {MAX_DEPTH} levels.")
        elif token in ("}", "]"):
            depth -= 1
        elif token == '"':
            # A string without an end: the decoder says so, and reads no bracket behind it.
            return


class _Objects:
    """Makes the decoder's dictionaries, inner ones first. twice: the members of the latest that has a key twice; last:
    those of the latest, in the end of the whole body."""

    def __init__(self) -> None:
        self.twice: list[tuple[str, Any]] | None = None
        self.last: list[tuple[str, Any]] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            self.twice = pairs
        self.last = pairs
        return value

    def check(self) -> None:
        """Raises HttpError for a key that was given twice: a parameter, or a member of one, which has no name here."""
        if self.twice is None:
            return
        ((key, _),) = Counter(key for key, _ in self.twice).most_common(1)
        name = key[:64].encode("utf-8", "replace").decode()
        text = f"The key {json.dumps(name, ensure_ascii=False)} is given twice."
        raise HttpError("invalid_request", [Problem(name if self.twice is self.last else None, text)])


def _constant(name: str) -> NoReturn:
    raise _Refused(Problem(None, f"{name} is not a JSON number."))


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Refused(Problem(None, f"The number {digits[:32]} is too large."))
    return value


def _int(digits: str) -> int:
    # Longer than any number that has a use here, and short of Python's own limit, which raises a plain ValueError.
    if len(digits) > 400:
        raise _Refused(Problem(None, f"A number of {len(digits)} digits is too large."))
    return int(digits)


def _check_surrogates(value: Any, path: str) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise HttpError(
                "invalid_request",
                [Problem(path or None, f"{path or 'A key'} holds a lone surrogate, which is not text.")],
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, "")
            _check_surrogates(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_surrogates(item, f"{path}[{index}]")

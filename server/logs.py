"""Log lines: one JSON object a line, or one line of text for a terminal.

A line holds ids, sizes, timings and reasons; never a prompt, an output or a key. What a module wants to say beside its
message goes into `extra={"fields": {...}}`. A traceback is written as its type and places, without the exception's
message, which may quote what a client sent.
"""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

import msgspec

_encode = msgspec.json.Encoder(enc_hook=repr).encode


def configure_logging(form: str, stream: TextIO | None = None) -> None:
    """Send all log records to `stream` (standard error) as "json" or "text" lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.captureWarnings(True)
    # Our own lines say what these would, with the request's id.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, logger, event, and the record's fields. Newlines are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(_fields(record))
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = exception_places(record.exc_info[1])
        return _encode(line).decode("utf-8")


class TextFormatter(logging.Formatter):
    """The same for a person: time, level, event, key=value. Control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_timestamp(record)[11:23], record.levelname.lower().ljust(7), record.getMessage()]
        parts += [f"{key}={value}" for key, value in _fields(record).items()]
        line = _printable(" ".join(parts))
        if record.exc_info and record.exc_info[1] is not None:
            line = "\n    ".join([line, *exception_places(record.exc_info[1])])
        return line


def exception_places(error: BaseException) -> list[str]:
    """The exception's type and where it went through, innermost last, causes after it; never its message."""
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        lines.append(type(current).__qualname__)
        lines += _frames(current.__traceback__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return lines


def _frames(trace: TracebackType | None) -> list[str]:
    return [f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in traceback.extract_tb(trace)]


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class SparingLog:
    """Lets so many lines a second pass, and counts the others."""

    def __init__(self, lines_a_second: int) -> None:
        self._allowed = lines_a_second
        self._second = 0
        self._written = 0
        self._left_out = 0

    def line(self, now: float) -> int | None:
        """None if this line is to be left out; else how many were left out since the last one that was not."""
        if int(now) != self._second:
            self._second, self._written = int(now), 0
        if self._written >= self._allowed:
            self._left_out += 1
            return None
        self._written += 1
        left_out, self._left_out = self._left_out, 0
        return left_out

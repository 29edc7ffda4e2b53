"""One record is one line, whatever is in it."""

from __future__ import annotations

import json
import logging

from server.logs import JsonFormatter, TextFormatter

EVIL = "a\r\nb\x1b[31m\x00\x85\u2028c"


def record() -> logging.LogRecord:
    return logging.makeLogRecord({"name": "stet.test", "msg": f"said {EVIL}", "fields": {"value": EVIL}})


def test_text_shows_no_control_character() -> None:
    line = TextFormatter().format(record())
    assert line.isprintable()
    assert line.count("a") >= 2
    assert line.count("c") >= 2


def test_json_keeps_the_value_on_one_line() -> None:
    line = JsonFormatter().format(record())
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["value"] == EVIL
    assert json.loads(line)["event"] == f"said {EVIL}"

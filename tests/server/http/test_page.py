"""The page's files as they are sent: what they are, how they are kept, and that they ask for nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from server.http.page import POLICY
from server.http.routes import PAGE_PATHS

FOLDER = Path(__file__).resolve().parents[3] / "server" / "http" / "static"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def test_every_file_has_a_path_and_every_path_a_file() -> None:
    assert sorted(PAGE_PATHS.values()) == sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("path", PAGE_PATHS)
def test_a_file_is_sent_once(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    content = (FOLDER / PAGE_PATHS[path]).read_bytes()
    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-type"].split(";")[0] == KINDS[Path(PAGE_PATHS[path]).suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == POLICY
    tag = answer.headers["etag"]
    kept = client.get(path, headers={"if-none-match": f'"other", {tag}'})
    assert (kept.status_code, kept.content, kept.headers["etag"]) == (304, b"", tag)
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    plain = client.get(path, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert (plain.content, plain.headers["etag"]) == (content, tag)
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")


def test_no_two_files_share_a_tag(client: httpx.Client) -> None:
    assert len({client.get(path).headers["etag"] for path in PAGE_PATHS}) == len(PAGE_PATHS)


def test_the_policy_lets_nothing_in_but_this_server() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert {rules.pop(f"{kind}-src") for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert {rules.pop(name) for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types")} == {"'none'"}
    assert rules == {"require-trusted-types-for": "'script'"}


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"\s(style|on\w+)\s*=|<style|<script(?![^>]*\ssrc=)|javascript:", page)
    for target in re.findall(r"(?:src|href)=\"([^\"]+)\"", page):
        assert target in PAGE_PATHS or target.startswith("#")
    for path in FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"//[\w.-]+\.\w+/|https?:/|@import|@font-face|innerHTML|eval\(", text), path.name
        assert path.suffix != ".css" or "url(" not in text
        for target in re.findall(r"from \"\./([^\"]+)\"", text):
            assert f"/static/{target}" in PAGE_PATHS
    # What a first visit costs: less than one photograph.
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 140_000

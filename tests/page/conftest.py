"""One real server with the embedded model and API keys, and one real browser, for all tests of the page."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright

from loadtests.processes import RunningServer, running_server
from server.keys import create_key

CHROMIUM = shutil.which("chromium")
# What a browser would ask of hosts of its own is switched off: this one has nobody but the server.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-default-apps", "--mute-audio"),
]
# Few places, so that one request of six texts takes all that its key may have.
PLACES = ["--max-running", "4", "--max-waiting", "4"]


@dataclass
class Served:
    """A running server, with a key that may everything and one that may only ask."""

    server: RunningServer
    admin: str
    infer: str

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /generate."""
        request = urllib.request.Request(
            f"{self.server.url}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.admin}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def metric(self, name: str) -> float:
        """One sample of /metrics."""
        request = urllib.request.Request(
            f"{self.server.url}/metrics", headers={"Authorization": f"Bearer {self.admin}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split(" ")[1]) for line in lines if line.startswith(name + " "))


@pytest.fixture(scope="package")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server on its way: the browser starts meanwhile."""
    if CHROMIUM is None:
        reason = "needs Chromium: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("page")
    keys = folder / "keys.toml"
    admin, infer = (create_key(keys, role, [role], {}) for role in ("admin", "infer"))
    with running_server([*PLACES, "--api-keys", str(keys)], log=folder / "log") as server:
        yield Served(server, admin, infer)


@pytest.fixture(scope="package")
def served(started: Served, browser: Browser) -> Served:
    started.server.wait_ready()
    return started


@pytest.fixture(scope="package")
def browser(started: Served) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One tab on the page, and everything that it asked for and complained of."""

    page: Page
    requests: list[Request]
    complaints: list[str]

    def bodies(self) -> list[dict[str, Any]]:
        """What was posted to /generate, in order."""
        posts = (request for request in self.requests if request.url.endswith("/generate"))
        return [json.loads(request.post_data or "null") for request in posts]


Visiting = Callable[..., Visit]


@pytest.fixture(scope="package")
def tab(browser: Browser) -> Iterator[Page]:
    """One tab for all tests: a new one costs more than what most of them do."""
    context = browser.new_context(
        viewport={"width": 1440, "height": 900},
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(8000)
    yield context.new_page()
    context.close()


@pytest.fixture
def visit(tab: Page, served: Served) -> Iterator[Visiting]:
    """Opens the page anew: visit(key=…). At the end nothing may have gone elsewhere or wrong."""
    visits: list[Visit] = []

    def open_page(key: str | None = None, ready: bool = True) -> Visit:
        page = tab
        visit = Visit(page, [], [])
        visits.append(visit)
        page.on("request", note_request)
        page.on("pageerror", note_error)
        page.on("console", note_line)
        # Any answer of the server gives the tab its origin; the key is there before the page's scripts run.
        if not page.url.startswith(served.server.url):
            page.goto(f"{served.server.url}/livez")
        page.evaluate("key => sessionStorage.setItem('stet-api-key', key)", key or served.admin)
        page.goto(served.server.url)
        if ready:
            page.locator("#draw[data-source=server]").wait_for()
        return visit

    def note_request(request: Request) -> None:
        visits[-1].requests.append(request)

    def note_error(error: Error) -> None:
        visits[-1].complaints.append(str(error))

    def note_line(message: ConsoleMessage) -> None:
        if message.type == "error":
            visits[-1].complaints.append(message.text)

    yield open_page
    tab.remove_listener("request", note_request)
    tab.remove_listener("pageerror", note_error)
    tab.remove_listener("console", note_line)
    for visit in visits:
        assert [request.url for request in visit.requests if not request.url.startswith(served.server.url + "/")] == []
        # The browser itself writes a line for each refusal; the tests of errors look at what the page makes of them.
        assert [line for line in visit.complaints if "Failed to load resource" not in line] == []


def until(condition: Callable[[], bool], page: Page, seconds: float = 8.0) -> None:
    """Waits for something that the page will show."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come about")

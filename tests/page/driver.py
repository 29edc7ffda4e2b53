"""What the tests of the page do again and again: fill in, press, read."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page

from tests.page.conftest import Visit

PROMPT = "Once upon a time there was a"


def field(page: Page, name: str, value: Any) -> None:
    """Fill a parameter's control in, opening its group."""
    control = page.locator(f"#parameter-{name}")
    control.evaluate("element => element.closest('details').open = true")
    control.fill(str(value))


def choose_form(page: Page, kind: str, text: str | None = None) -> None:
    """What the text must be; "" is anything."""
    control = page.locator("#parameter-form")
    control.evaluate("element => element.closest('details').open = true")
    control.select_option(kind)
    if text is not None:
        page.locator("#parameter-form-text").fill(text)


def keep_seed(page: Page, seed: int) -> None:
    page.locator("#seed").fill(str(seed))


def generate(page: Page, pane: str = "a") -> str:
    """Press the button, wait for the end, and read the text."""
    page.locator("#generate").click()
    page.locator("#generate:enabled").wait_for()
    return text_of(page, pane)


def text_of(page: Page, pane: str = "a") -> str:
    return str(page.locator(f"#output-{pane} .text").first.evaluate("element => element.textContent"))


def asked(visit: Visit) -> dict[str, Any]:
    """The last generation that the page has asked for, without what it only watches."""
    body = next(body for body in reversed(visit.bodies()) if body.get("stream"))
    return {name: value for name, value in body.items() if name not in ("stream", "explain", "logprobs")}


def percent(value: float) -> str:
    if value in (0, 1):
        return f"{value * 100:.0f} %"
    if value < 0.0005:
        return "< 0.1 %"
    if 0.9995 < value < 1:
        return "> 99.9 %"
    return f"{value * 100:.1f} %"


def rows(page: Page) -> list[list[str]]:
    """The candidates as they are shown: the model's share, and the settings' or what removed it."""
    more = page.locator("#inspector .under button")
    if "all" in (more.text_content() or ""):
        more.click()
    # What is written for those who hear the page only is left out.
    script = """rows => rows.map(row => [...row.querySelectorAll("td")].slice(1).map(
      cell => (cell.querySelector(".cut")?.lastChild ?? cell).textContent
    ))"""
    found: list[list[str]] = page.locator("#inspector tbody tr").evaluate_all(script)
    return found


def shown(draw: dict[str, Any]) -> list[list[str]]:
    words = {"temperature": "temperature 0", "weight": "too unlikely"}
    return [
        [
            percent(one["probability"]),
            words.get(one["removed_by"], one["removed_by"]) if one["removed_by"] else percent(one["final_probability"]),
        ]
        for one in draw["candidates"]
    ]


def settle(page: Page) -> None:
    """Wait until the next token is the server's word on what is set now."""
    page.locator("#draw[data-source=server]").wait_for()

"""What goes wrong is told in words: refusals, a full queue, keys, and at last a server that dies."""

from __future__ import annotations

import json
import socket

from playwright.sync_api import expect

from tests.page.conftest import Served, Visiting, until
from tests.page.driver import PROMPT, choose_form, field, generate, text_of


def test_refusals_are_told_in_words(visit: Visiting) -> None:
    tab = visit()
    page = tab.page
    error = page.locator("#error")
    field(page, "top_p", 0)
    field(page, "n", -3)
    page.locator("#generate").click()
    expect(error).to_contain_text("The server refused the request")
    for name in ("top_p", "n"):
        expect(page.locator(f"#parameter-{name}")).to_have_attribute("aria-invalid", "true")
        expect(page.locator(f"#parameter-{name}-problem")).to_contain_text(f"{name} must be")
    field(page, "top_p", 0.9)
    field(page, "n", 1)
    expect(page.locator("#parameter-top_p-problem")).to_be_hidden()
    field(page, "logit_bias", "seventeen")
    expect(page.locator("#parameter-logit_bias-problem")).to_contain_text("“seventeen” is not of the form")
    asked_before = len(tab.bodies())
    page.locator("#generate").click()
    expect(page.locator("#parameter-logit_bias")).to_be_focused()
    assert [body for body in tab.bodies()[asked_before:] if body.get("stream")] == [], "what cannot be read is not sent"
    field(page, "logit_bias", "")
    page.get_by_label("Prompt: a text to go on with").fill("fox " * 1500)
    page.locator("#generate").click()
    expect(error).to_contain_text("The prompt is too long")
    expect(error).to_contain_text("1024")
    expect(page.locator("#length")).to_have_text("more than 1,024 tokens")
    page.get_by_label("Prompt: a text to go on with").fill(PROMPT)
    field(page, "max_new_tokens", 10)
    error.get_by_role("button", name="Try again").click()
    expect(page.locator("#output-a .ending")).to_contain_text("token")
    expect(error).to_be_hidden()


def test_a_wrong_form_is_told_at_its_control(visit: Visiting) -> None:
    page = visit().page
    text, problem = page.locator("#parameter-form-text"), page.locator("#parameter-form-problem")
    field(page, "n", -3)
    page.locator("#compare").check()
    choose_form(page, "json_schema", '{"type": "object", "not": {}}')
    expect(problem).to_have_text("json_schema uses what is not supported: not.")
    expect(text).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#draw-words")).to_contain_text("is said at the control that is marked")
    text.fill('{"type": ')
    expect(problem).to_contain_text("The schema is no JSON: ")
    page.locator("#generate").click()
    expect(text).to_be_focused()
    choose_form(page, "regex", "[a-")
    expect(problem).to_have_text("regex is not valid: unclosed character class.")
    choose_form(page, "")
    expect(problem).to_be_hidden()
    # It is B that is wrong now, while A is looked at.
    field(page, "n", 1)
    page.get_by_label("Settings B", exact=True).check()
    choose_form(page, "grammar", "start: nowhere")
    page.get_by_label("Settings A", exact=True).check()
    expect(problem).to_be_hidden()
    field(page, "max_new_tokens", 900)
    page.locator("#parameter-ignore_eos").check()
    page.locator("#generate").click()
    expect(problem).to_contain_text('unknown name: "nowhere"')
    expect(page.get_by_label("Settings B", exact=True)).to_be_checked()
    expect(page.locator("#stop")).to_be_enabled()
    page.locator("#stop").click()


def test_a_full_queue_is_told(visit: Visiting, served: Served) -> None:
    # Of eight places one key may hold six.
    page = visit(key=served.infer).page
    full = {"prompt": PROMPT, "n": 6, "max_new_tokens": 900, "ignore_eos": True, "stream": True}
    body = json.dumps(full).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.infer}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((served.server.host, served.server.port)) as connection:
        connection.sendall(head.encode() + body)
        assert b"200" in connection.recv(64)
        field(page, "max_new_tokens", 10)
        page.locator("#generate").click()
        expect(page.locator("#error")).to_contain_text("All places are taken")
        expect(page.locator("#error")).to_contain_text("Try again in about")
    page.wait_for_timeout(100)
    page.locator("#error").get_by_role("button", name="Try again").click()
    expect(page.locator("#output-a .ending")).to_contain_text("token")


def test_a_key_is_asked_for_and_its_role_told(visit: Visiting, served: Served) -> None:
    page = visit(key="stet-wrong", ready=False).page
    expect(page.locator("#key")).to_be_visible()
    expect(page.locator("#error")).to_contain_text("asks for an API key")
    expect(page.locator("#key-input")).to_be_focused()
    page.locator("#key-input").fill(served.infer)
    page.keyboard.press("Enter")
    page.locator("#draw[data-source=server]").wait_for()
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#error")).to_be_hidden()
    field(page, "max_new_tokens", 10)
    assert len(generate(page)) > 20
    expect(page.locator("#server")).to_contain_text("may not read the server's metrics")
    assert page.evaluate("[localStorage.length, document.cookie, location.href.includes('stet-')]") == [0, "", False]


def test_a_server_that_dies_is_told(visit: Visiting, served: Served) -> None:
    """The last one: afterwards there is no server."""
    page = visit().page
    field(page, "max_new_tokens", 900)
    page.locator("#parameter-ignore_eos").check()
    page.locator("#generate").click()
    until(lambda: page.locator("#output-a .token").count() > 4, page)
    served.server.process.kill()
    expect(page.locator("#error")).to_contain_text("The connection broke in the middle of the text")
    assert len(text_of(page)) > 10
    expect(page.locator("#state")).to_have_text("does not answer", timeout=15000)
    page.locator("#error").get_by_role("button", name="Try again").click()
    expect(page.locator("#error")).to_contain_text("The server does not answer")

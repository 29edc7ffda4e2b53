"""The page for everyone: the policy in force, axe in light, dark and on a phone, and all of it by keyboard."""

from __future__ import annotations

import re
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.page.conftest import Visiting
from tests.page.driver import field, generate, keep_seed, text_of


def test_the_policy_is_in_force(visit: Visiting) -> None:
    tab = visit()
    page = tab.page
    refused = page.evaluate(
        """async () => {
          const found = [];
          document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
          const script = document.createElement("script");
          try { script.text = "window.stranger = 1"; document.head.append(script); } catch { found.push("text"); }
          const style = document.createElement("style");
          style.textContent = "body { display: none }";
          document.head.append(style);
          try { await fetch("http://elsewhere.invalid/"); } catch {}
          const image = document.createElement("img");
          image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
          document.body.append(image);
          await new Promise((resolve) => setTimeout(resolve, 50));
          return [found, window.stranger ?? null, getComputedStyle(document.body).display];
        }"""
    )
    directives, stranger, display = refused
    tab.complaints.clear()  # the browser's, of each refusal
    assert stranger is None
    assert display != "none"
    assert {"style-src-elem", "connect-src", "img-src"} <= set(directives)
    assert {"text", "script-src-elem", "require-trusted-types-for"} & set(directives)


def test_axe_finds_nothing_and_nothing_sticks_out(visit: Visiting) -> None:
    page = visit().page
    axe = Axe()

    def check(scheme: str, width: int, rules: list[str] | None = None) -> None:
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.set_viewport_size({"width": width, "height": 900})
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        if rules:
            options["runOnly"] = {"type": "rule", "values": rules}
        found = axe.run(page, options=options)
        assert found.violations_count == 0, f"{scheme}, {width}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width

    page.locator("#compare").check()
    keep_seed(page, 7)
    field(page, "max_new_tokens", 30)
    generate(page)
    page.locator("#output-a .token").nth(2).click()
    check("dark", 390, ["color-contrast"])
    page.get_by_label("Examples", exact=True).check()
    page.locator("#prompt summary").click()
    page.locator("#controls details").evaluate_all("all => all.forEach(one => one.open = true)")
    field(page, "top_p", 0)
    page.locator("#generate").click()
    page.locator("#error").wait_for()
    page.locator("#key-open").click()
    check("light", 1440)
    check("light", 390, ["color-contrast", "label", "button-name", "scrollable-region-focusable", "nested-interactive"])
    page.locator("#copy").click()
    assert axe.run(page, context="#code").violations_count == 0
    page.set_viewport_size({"width": 1440, "height": 900})


def test_all_of_it_by_keyboard(visit: Visiting) -> None:
    page = visit().page
    focused = "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(focused))
    assert seen.index("Prompt: a text to go on with") < seen.index("generate") < seen.index("seed") < seen.index("keep")
    page.locator("#parameter-temperature").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#parameter-temperature").input_value() == "0.85"
    field(page, "max_new_tokens", 12)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#output-a .ending")).to_contain_text("tokens")
    # What a screen reader hears: sentences, not tokens, and all of the text; then the token that is opened.
    heard = page.locator("#announcer p").all_text_contents()
    assert " ".join(heard).split() == text_of(page).split()
    assert len(heard) < 8
    page.locator("#output-a .token").first.focus()
    page.keyboard.press("Enter")
    assert (page.locator("#announcer p").last.text_content() or "").startswith("Token 1, ")
    expect(page.locator("#draw-title")).to_have_text(re.compile("^Token 1 of"))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#draw-title")).to_have_text(re.compile("^Token 2 of"))
    page.keyboard.press("Escape")
    expect(page.locator("#draw-title")).to_have_text("Next token")

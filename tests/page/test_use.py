"""Two settings side by side, code that runs, and what was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from playwright.sync_api import expect

from tests.page.conftest import Served, Visiting
from tests.page.driver import PROMPT, asked, field, generate, keep_seed, settle, text_of


def test_two_settings_side_by_side(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    keep_seed(page, 9)
    field(page, "max_new_tokens", 16)
    page.locator("#compare").check()
    page.get_by_label("Settings B", exact=True).check()
    page.locator("[data-preset=greedy]").click()
    generate(page)
    bodies = [body for body in tab.bodies() if body.get("stream")]
    assert [(body["temperature"], body["seed"], body["prompt"]) for body in bodies] == [
        (0.8, 9, PROMPT),
        (0, 9, PROMPT),
    ]
    answers = [served.ask(body | {"stream": False, "return_token_ids": True})["outputs"][0] for body in bodies]
    assert [text_of(page, "a"), text_of(page, "b")] == [answer["text"] for answer in answers]
    ids = [answer["token_ids"] for answer in answers]
    same = next(place for place, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
    words = "with the first token" if same == 0 else "the same token;" if same == 1 else f"the same {same} token"
    expect(page.locator("#parting")).to_contain_text(words)
    expect(page.locator("#pane-b .differs")).to_contain_text("temperature 0")
    page.locator("#output-b .token").nth(1).click()
    expect(page.locator("#draw-words")).to_contain_text("in B")
    assert page.locator("#runs article").count() == 2


def test_the_copied_code_runs(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    prompt = "It's “so” \\ $HOME `x`\n\t🌙 the fox's"
    page.get_by_label("Prompt: a text to go on with").fill(prompt)
    keep_seed(page, 7)
    field(page, "max_new_tokens", 16)
    field(page, "stop", "never'said")
    page.locator("#parameter-ignore_eos").check()
    text = generate(page)
    page.locator("#copy").click()
    for language in ("curl", "Python"):
        page.locator("#code").get_by_label(language, exact=True).check()
        page.locator("#code-copy").click()
        expect(page.locator("#code-done")).to_have_text("Copied.")
        code = str(page.evaluate("navigator.clipboard.readText()"))
        assert code == page.locator("#code-text").text_content()
        assert served.admin not in code
        command = ["sh", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        environment = {"PATH": os.environ["PATH"], "STET_API_KEY": served.admin}
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout.decode()
        if language == "curl":
            events = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("data: {")]
            printed = "".join(event.get("text", "") for event in events) + "\n"
        assert printed == text + "\n", language


def test_the_panel_tells_what_the_answer_told(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    prompt = "The old lighthouse keeper counted his boats and told the fox of each. " * 4
    page.get_by_label("Prompt: a text to go on with").fill(prompt)
    settle(page)
    field(page, "max_new_tokens", 20)
    page.locator("#parameter-ignore_eos").check()
    generate(page)
    said = served.ask(asked(tab) | {"dry_run": True})["usage"]
    expect(page.locator("#length")).to_have_text(f"{said['prompt_tokens']} of 1,024 tokens")
    figures = page.locator("#runs").inner_text()
    assert re.search(r"First token\s+\d", figures)
    assert re.search(r"Speed\s+[\d,]+\s+tokens/s", figures)
    assert re.search(rf"Tokens\s+20\s+after {said['prompt_tokens']}\b", figures)
    cached = re.search(r"From the cache\s+(\d+)\s", figures)
    assert cached
    assert int(cached[1]) > 0, "the next token was asked for before"
    for part in ("waiting", "reading the prompt", "writing", "on the way"):
        assert re.search(rf"{part} [\d.]+ m?s", figures)
    expect(page.locator("#server")).to_contain_text("KV blocks in use")
    assert re.search(r"Cache hits\s+[\d.]+ %", page.locator("#server").inner_text())

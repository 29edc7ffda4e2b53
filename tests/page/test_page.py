"""The page in a real browser against a real server: what it shows is what the API says, and what goes wrong is told."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import subprocess
import sys
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.conftest import Served, Visit, Visiting, until

PROMPT = "Once upon a time there was a"
WEIGHING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def field(page: Page, name: str, value: Any) -> None:
    """Fill a parameter's control in, opening its group."""
    control = page.locator(f"#parameter-{name}")
    control.evaluate("element => element.closest('details').open = true")
    control.fill(str(value))


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
    page.locator("#inspector .under button").click()  # all of them
    # What is written for those who hear the page only is left out.
    script = """rows => rows.map(row => [...row.querySelectorAll("td")].slice(1).map(
      cell => (cell.querySelector(".cut")?.lastChild ?? cell).textContent
    ))"""
    found: list[list[str]] = page.locator("#inspector tbody tr").evaluate_all(script)
    page.locator("#inspector .under button").click()
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


# --- where it comes from ------------------------------------------------------------------------------------------


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


# --- the text -----------------------------------------------------------------------------------------------------


def test_each_preset_gives_the_apis_text(visit: Visiting, served: Served) -> None:
    tab = visit()
    keep_seed(tab.page, 7)
    weighing = {
        "greedy": (0, 1, None),
        "balanced": (0.8, 0.95, None),
        "creative": (1.2, 1, 0.08),
        "plain": (1, 1, None),
    }
    texts = set()
    field(tab.page, "max_new_tokens", 40)
    for preset, (temperature, top_p, min_p) in weighing.items():
        tab.page.locator(f"[data-preset={preset}]").click()
        text = generate(tab.page)
        body = asked(tab)
        assert (body["prompt"], body["seed"], body["max_new_tokens"]) == (PROMPT, 7, 40)
        assert (body["temperature"], body["top_p"], body.get("min_p")) == (temperature, top_p, min_p)
        answer = served.ask(body)
        assert len(text) > 40
        assert text == answer["outputs"][0]["text"]
        ending = tab.page.locator("#output-a .ending")
        expect(ending).to_contain_text(f"{answer['usage']['completion_tokens']} tokens")
        texts.add(text)
    assert len(texts) > 2


def test_every_control_reaches_the_request(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    page.get_by_label("Prompt: a text to go on with").fill("The owl said: good night 🌙.")
    keep_seed(page, 11)
    numbers = {
        "temperature": 1.1,
        "top_k": 40,
        "top_p": 0.97,
        "min_p": 0.01,
        "typical_p": 0.99,
        "n": 2,
        "repetition_penalty": 1.05,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "max_new_tokens": 20,
        "min_new_tokens": 3,
    }
    for name, value in numbers.items():
        field(page, name, value)
    field(page, "stop", "xyzzy\\n\nnever said")
    field(page, "stop_token_ids", "3001, 3002")
    field(page, "bad_words", "kite")
    field(page, "logit_bias", "17: -5\n19: 0.5")
    field(page, "allowed_token_ids", " ".join(map(str, range(3840))))
    for name in ("include_stop", "ignore_eos"):
        page.locator(f"#parameter-{name}").check()
    text = generate(page)
    lists = {
        "stop": ["xyzzy\n", "never said"],
        "stop_token_ids": [3001, 3002],
        "bad_words": ["kite"],
        "logit_bias": {"17": -5, "19": 0.5},
        "allowed_token_ids": list(range(3840)),
    }
    flags = {"include_stop": True, "ignore_eos": True}
    assert asked(tab) == {"prompt": "The owl said: good night 🌙.", "seed": 11, **numbers, **lists, **flags}
    outputs = served.ask(asked(tab))["outputs"]
    assert [text, page.locator("#output-a .text").nth(1).text_content()] == [one["text"] for one in outputs]


def test_a_seed_is_drawn_until_it_is_kept(visit: Visiting) -> None:
    tab = visit()
    field(tab.page, "max_new_tokens", 12)
    seeds = []
    for kept in (False, False, True, True):
        tab.page.locator("#keep").set_checked(kept)
        generate(tab.page)
        seeds.append(asked(tab)["seed"])
        assert tab.page.locator("#seed").input_value() == str(seeds[-1])
    assert len(set(seeds[:2])) == 2
    assert seeds[1] == seeds[2] == seeds[3]


def test_a_stream_can_be_stopped(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    keep_seed(page, 3)
    field(page, "max_new_tokens", 900)
    page.locator("#parameter-ignore_eos").check()
    page.locator("#generate").click()
    until(lambda: page.locator("#output-a .token").count() > 8, page)
    expect(page.locator("#generate")).to_be_disabled()
    page.locator("#stop").click()
    expect(page.locator("#output-a .ending")).to_contain_text("stopped by you")
    text = text_of(page)
    whole = served.ask(asked(tab) | {"max_new_tokens": 300})["outputs"][0]["text"]
    assert len(text) > 20
    assert whole.startswith(text) or text.startswith(whole), "what was shown is the begin of the text"
    until(lambda: served.metric("stet_requests_running") == 0, page)


def test_a_chat_goes_on(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    page.get_by_label("Chat", exact=True).check()
    keep_seed(page, 1)
    field(page, "max_new_tokens", 30)
    page.get_by_label("Message 1", exact=True).fill("Good night.")
    first = generate(page)
    assert first == served.ask(asked(tab))["outputs"][0]["text"]
    page.locator("#continue").click()
    page.get_by_label("Message 3", exact=True).fill("Tell me a story.")
    generate(page)
    assert asked(tab)["messages"] == [
        {"role": "user", "content": "Good night."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Tell me a story."},
    ]


def test_examples_make_the_prompt(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    page.get_by_label("Examples", exact=True).check()
    keep_seed(page, 1)
    field(page, "temperature", 0)
    field(page, "max_new_tokens", 20)
    pair = "Q: Translate into Lumi: the red fox\nA: la roto vika\n\n"
    question = "Q: Translate into Lumi: the happy owl sings\nA:"
    for shots, begin in (("Zero-shot", question), ("One-shot", pair + question), ("Few-shot", pair)):
        page.get_by_label(shots, exact=True).check()
        text = generate(page)
        body = asked(tab)
        assert body["prompt"].startswith(begin)
        assert body["prompt"].endswith(question)
        assert body["stop"] == ["\nQ:"]
        assert text == served.ask(body)["outputs"][0]["text"]
    assert body["prompt"].count("Q: ") == 4
    page.get_by_label("as turns of a chat").check()
    page.get_by_label("Instruction, if any").fill("Answer briefly.")
    generate(page)
    assert [message["role"] for message in asked(tab)["messages"]] == ["system", *["user", "assistant"] * 3, "user"]


# --- the draw -----------------------------------------------------------------------------------------------------


def test_a_token_opens_its_draw(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    keep_seed(page, 7)
    field(page, "max_new_tokens", 24)
    page.locator("[data-preset=creative]").click()
    text = generate(page)
    draws = served.ask(asked(tab) | {"explain": 20})["outputs"][0]["explain"]
    tokens = page.locator("#output-a .token")
    assert tokens.count() == len(draws)
    assert tokens.all_text_contents() == [draw["text"] for draw in draws]
    assert "".join(draw["text"] for draw in draws) == text
    for place in (0, 5, len(draws) - 1):
        tokens.nth(place).click()
        draw = draws[place]
        assert rows(page) == shown(draw)
        own = next(one for one in draw["candidates"] if one["id"] == draw["id"])
        words = page.locator("#draw-words").inner_text()
        assert f"gave it {percent(own['probability'])}" in words
        assert f"made that {percent(own['final_probability'])}" in words
        drawn = page.locator("#inspector tr.drawn th").evaluate("cell => cell.title")
        assert drawn == f"token {draw['id']}"
        # The point on the line is where r says, and inside the drawn token's segment.
        point = page.locator(".point").evaluate("mark => parseFloat(mark.style.left)")
        assert point == pytest.approx(100 * draw["r"] / 2**31, abs=0.001)
        left, width = page.locator(".segment.drawn").evaluate(
            "part => [parseFloat(part.style.left), parseFloat(part.style.width)]"
        )
        first, end = (100 * edge / draw["K"] for edge in own["interval"])
        assert (left, width) == (pytest.approx(first, abs=0.002), pytest.approx(end - first, abs=0.002))
        assert left - 0.001 <= point <= left + width + 0.001
    # How strongly a token is shaded grows with its surprise.
    shades = tokens.evaluate_all("all => all.map(one => Number(one.style.getPropertyValue('--surprise')))")
    chances = [next(one["probability"] for one in draw["candidates"] if one["id"] == draw["id"]) for draw in draws]
    order = sorted(range(len(draws)), key=lambda place: chances[place])
    assert [shades[place] for place in order] == sorted(shades, reverse=True)
    assert max(shades) > min(shades)
    # Without explanations the model's own word is left.
    page.locator("#explain").uncheck()
    field(page, "max_new_tokens", 6)
    generate(page)
    page.locator("#output-a .token").nth(2).click()
    top = served.ask(asked(tab) | {"logprobs": 20})["outputs"][0]["logprobs"][2]["top"]
    assert [row[0] for row in rows(page)] == [percent(math.exp(one["logprob"])) for one in top]
    assert "was not explained" in page.locator("#draw-words").inner_text()


def test_the_next_token_follows_the_sliders(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    base = {"prompt": PROMPT, "max_new_tokens": 1, "explain": 20, "repetition_penalty": 1, "top_p": 1, "typical_p": 1}
    base["seed"] = int(page.locator("#seed").input_value())  # a drawn token beyond the twenty is shown, too
    for preset, weighing in (
        ("greedy", (0, 0, 1, 0, 1)),
        ("plain", (1, 0, 1, 0, 1)),
        ("creative", (1.2, 0, 1, 0.08, 1)),
    ):
        page.locator(f"[data-preset={preset}]").click()
        settle(page)
        body = base | dict(zip(WEIGHING, weighing, strict=True))
        draw = served.ask(body)["outputs"][0]["explain"][0]
        assert rows(page) == shown(draw)
    slider = page.get_by_label("Temperature, slider")
    for temperature in ("0.3", "1.9"):
        before = rows(page)
        slider.evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", temperature
        )
        # At once, by the page alone: no answer can have come yet.
        assert page.locator("#draw").get_attribute("data-source") == "page"
        settle(page)
        assert rows(page) != before
        body = base | {"temperature": float(temperature), "min_p": 0.08}
        assert rows(page) == shown(served.ask(body)["outputs"][0]["explain"][0])
    note = page.locator("#inspector .note").inner_text()
    assert re.match(r"The 20 most likely of 3,840 tokens. The other 3,820 together have .+ %, with the settings", note)
    # A kept seed says which one it would be; nothing was generated for all that.
    keep_seed(page, 7)
    settle(page)
    expect(page.locator("#draw-words")).to_contain_text("With seed 7 it would be")
    drawn = page.locator("#inspector tr.drawn th").evaluate("cell => cell.title")
    answer = served.ask(body | {"seed": 7, "return_token_ids": True})
    assert drawn == f"token {answer['outputs'][0]['token_ids'][0]}"
    assert not any(body.get("stream") for body in tab.bodies())
    page.get_by_label("Prompt: a text to go on with").fill("The king")
    settle(page)
    assert rows(page) != shown(draw)


def test_filters_in_the_page_are_the_servers(visit: Visiting, served: Served) -> None:
    """Over random settings: equal where the page calls it exact, which must be often; else near."""
    page = visit().page
    rng = random.Random(6)
    exact = estimated = 0
    for number in range(36):
        prompt = rng.choice([PROMPT, "The", "Q: What is 3 + 4?\nA:", "One morning the bear"])
        settings: dict[str, Any] = {
            "temperature": rng.choice([0, 0.3, 0.7, 1, 1, 1.3, 2]),
            "top_k": rng.choice([0, 0, 1, 3, 12, 19, 40]),
            "top_p": rng.choice([1, 1, 0.5, 0.9, 0.99]),
            "min_p": rng.choice([0, 0, 0.02, 0.2]),
            "typical_p": rng.choice([1, 1, 1, 0.6]),
        }
        body = {"prompt": prompt, "max_new_tokens": 1, "seed": number, "explain": 20, "repetition_penalty": 1}
        plain = served.ask(body | {"temperature": 1, "top_p": 1})["outputs"][0]["explain"][0]["candidates"]
        wanted = served.ask(body | settings)["outputs"][0]["explain"][0]["candidates"]
        found = page.evaluate(
            """async ([candidates, settings]) => {
              const { canRecompute, recompute } = await import("/static/filters.js");
              const lists = { logit_bias: [], allowed_token_ids: [], bad_words: [] };
              const others = { repetition_penalty: 1, min_new_tokens: 0, ...lists };
              return canRecompute({ ...others, ...settings }) && recompute(candidates, 20, 3840, settings);
            }""",
            [plain, settings],
        )
        known = {one["id"]: one for one in found["candidates"]}
        common = [one for one in wanted if one["id"] in known]
        assert len(common) >= 20
        off = max(abs(known[one["id"]]["final_probability"] - one["final_probability"]) for one in common)
        if found["exact"]:
            exact += 1
            assert off < 2e-3, (settings, off)
            assert all(known[one["id"]]["removed_by"] == one["removed_by"] for one in common), settings
        else:
            estimated += 1
            assert off < 0.3, (settings, off)
    assert exact > 18
    assert estimated > 1


# --- side by side, code, measures ---------------------------------------------------------------------------------


def test_two_settings_side_by_side(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    keep_seed(page, 9)
    field(page, "max_new_tokens", 30)
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
    field(page, "max_new_tokens", 30)
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


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_refusals_are_told_in_words(visit: Visiting) -> None:
    page = visit().page
    error = page.locator("#error")
    field(page, "top_p", 0)
    field(page, "n", 20)
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
    field(page, "logit_bias", "")
    page.get_by_label("Prompt: a text to go on with").fill("fox " * 1500)
    page.locator("#generate").click()
    expect(error).to_contain_text("The prompt is too long")
    expect(error).to_contain_text("1024")
    page.get_by_label("Prompt: a text to go on with").fill(PROMPT)
    field(page, "max_new_tokens", 10)
    error.get_by_role("button", name="Try again").click()
    expect(page.locator("#output-a .ending")).to_contain_text("token")
    expect(error).to_be_hidden()


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


# --- for everyone -------------------------------------------------------------------------------------------------


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
    check("light", 390)
    check("dark", 1440, ["color-contrast"])
    page.get_by_label("Examples", exact=True).check()
    page.locator("#prompt summary").click()
    page.locator("#controls details").evaluate_all("all => all.forEach(one => one.open = true)")
    field(page, "top_p", 0)
    page.locator("#generate").click()
    page.locator("#error").wait_for()
    page.locator("#key-open").click()
    check("light", 1440)
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
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

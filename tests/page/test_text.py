"""What is generated on the page: the text is what the API says for the same request, in every way to ask."""

from __future__ import annotations

import json
import re

from playwright.sync_api import expect

from tests.page.conftest import Served, Visiting, until
from tests.page.driver import PROMPT, asked, choose_form, field, generate, keep_seed, text_of


def test_each_preset_gives_the_apis_text_and_a_seed_is_kept(visit: Visiting, served: Served) -> None:
    tab = visit()
    keep_seed(tab.page, 7)
    weighing = {
        "greedy": (0, 1, None),
        "balanced": (0.8, 0.95, None),
        "creative": (1.2, 1, 0.08),
        "plain": (1, 1, None),
    }
    texts = set()
    field(tab.page, "max_new_tokens", 24)
    for preset, (temperature, top_p, min_p) in weighing.items():
        tab.page.locator(f"[data-preset={preset}]").click()
        text = generate(tab.page)
        body = asked(tab)
        assert (body["prompt"], body["seed"], body["max_new_tokens"]) == (PROMPT, 7, 24)
        assert (body["temperature"], body["top_p"], body.get("min_p")) == (temperature, top_p, min_p)
        answer = served.ask(body)
        assert len(text) > 40
        assert text == answer["outputs"][0]["text"]
        ending = tab.page.locator("#output-a .ending")
        expect(ending).to_contain_text(f"{answer['usage']['completion_tokens']} tokens")
        texts.add(text)
    assert len(texts) > 2
    # A seed is drawn each time, unless it is kept.
    field(tab.page, "max_new_tokens", 4)
    seeds = []
    for kept in (False, False, True):
        tab.page.locator("#keep").set_checked(kept)
        generate(tab.page)
        seeds.append(asked(tab)["seed"])
        assert tab.page.locator("#seed").input_value() == str(seeds[-1])
    assert len({7, *seeds[:2]}) == 3
    assert seeds[1] == seeds[2]


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


def test_each_form_is_kept_to(visit: Visiting, served: Served) -> None:
    """As it stands in the control to begin with, and the ones that are written there."""
    tab = visit()
    page = tab.page
    keep_seed(page, 5)
    page.locator("#explain").uncheck()
    for kind, text in (("json_schema", None), ("regex", None), ("grammar", None), ("choice", " wolf\n old witch\n")):
        choose_form(page, kind, text)
        shown = generate(page)
        asked_for = asked(tab)
        assert {"json_schema", "regex", "grammar", "choice"} & set(asked_for) == {kind}
        assert shown == served.ask(asked_for)["outputs"][0]["text"]
        expect(page.locator("#output-a .ending")).to_contain_text("complete in its form")
        if kind == "json_schema":
            assert list(json.loads(shown)) == ["animal", "age", "brave"]
        elif kind == "regex":
            assert re.fullmatch(asked_for["regex"], shown)
        elif kind == "choice":
            assert asked_for["choice"] == [" wolf", " old witch"]
            assert shown in asked_for["choice"]


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
    field(page, "max_new_tokens", 16)
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

"""How a token is drawn, as the page shows it: equal to what `explain` says, before and after."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Served, Visiting
from tests.page.driver import PROMPT, asked, field, generate, keep_seed, percent, rows, settle, shown

WEIGHING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def test_a_token_opens_its_draw(visit: Visiting, served: Served) -> None:
    tab = visit()
    page = tab.page
    keep_seed(page, 7)
    field(page, "max_new_tokens", 16)
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
    base["seed"] = 1
    for preset, weighing in (
        ("greedy", (0, 0, 1, 0, 1)),
        ("plain", (1, 0, 1, 0, 1)),
        ("creative", (1.2, 0, 1, 0.08, 1)),
    ):
        page.locator(f"[data-preset={preset}]").click()
        settle(page)
        body = base | dict(zip(WEIGHING, weighing, strict=True))
        draw = served.ask(body)["outputs"][0]["explain"][0]
        assert rows(page) == shown(draw)[:20], "the token that would be drawn has no place of its own"
    slider = page.get_by_label("Temperature, slider")
    before = rows(page)
    slider.evaluate("slider => { slider.value = 1.9; slider.dispatchEvent(new Event('input')) }")
    # At once, by the page alone: no answer can have come yet.
    assert page.locator("#draw").get_attribute("data-source") == "page"
    settle(page)
    assert rows(page) != before
    body = base | {"temperature": 1.9, "min_p": 0.08}
    assert rows(page) == shown(served.ask(body)["outputs"][0]["explain"][0])[:20]
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
    for number in range(28):
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
    assert exact > 14
    assert estimated > 1

"""The whole way from request to events, over a real child process: texts, places, refusals, deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.engine.request import FinishReason
from server.generation import Completed, GenerationRequest, Refusal, Started, TextDelta
from server.rates import DrainRate
from server.service import ServiceSettings
from tests.server.fake_engine import expected_tokens
from tests.server.harness import TOKENIZER, VOCABULARY, Answer, Server, collect, decode, encode, ids_request, run

EOS = 0  # "<|end|>"


# Text


def first_stop(ids: list[int], stops: tuple[str, ...], include: bool, min_new: int = 0) -> tuple[str, str | None, int]:
    """The text of ids up to their first stop string, that stop, and the tokens it took; by trying every prefix."""
    for count in range(1, len(ids) + 1):
        # What a prefix says for certain: an incomplete character at its end is not text yet.
        text = decode(ids[:count])
        certain = text if count == len(ids) else text.rstrip("\ufffd")
        ends = [(certain.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in certain]
        if ends and count >= min_new:
            end, _, stop = min(ends)
            return certain[: end if include else end - len(stop)], stop, count
    return decode(ids), None, len(ids)


WORDS = ["a", " the", "é", "你好", "🙂", "👩‍🚀", " STOP", "\n", "żó", "END", ".", "naïve", " stop string"]
STOPS = [
    "STOP",
    "the",
    "好",
    "TOP",
    "a.",
    "N",
    "a the",
    "好🙂",
    "\n\n",
    "ENDEND",
    ".a",
    "é",
    "🚀",
    "żó.",
    " stop st",
    "zzz",
]


def random_request(rng: random.Random) -> tuple[list[int], GenerationRequest]:
    ids = encode("".join(rng.choices(WORDS, k=rng.randint(1, 12))))
    stops = tuple(rng.sample(STOPS, rng.choice([0, 1, 2, 3])))
    return ids, ids_request(ids, max_new_tokens=1000, stop=stops, include_stop=rng.random() < 0.3)


@pytest.mark.parametrize("faults", [{}, {"crash_after": 1500, "faulty_starts": 1}], ids=["undisturbed", "crash"])
def test_the_deltas_of_500_random_requests_join_to_the_whole_text(tmp_path: Path, faults: dict[str, Any]) -> None:
    rng = random.Random(20261123)
    cases = [random_request(rng) for _ in range(500)]
    # The cases do what they are for: characters cut across tokens, stops cut across tokens.
    assert sum(decode(ids[:cut]).endswith("\ufffd") for ids, _ in cases for cut in range(len(ids))) > 500
    assert sum(first_stop(ids, case.stop, False)[1] is not None for ids, case in cases) > 130

    async def test(server: Server) -> None:
        async def one(ids: list[int], request: GenerationRequest) -> None:
            answer = await collect(server.service, request)
            text, stop, count = first_stop(ids, request.stop, request.include_stop)
            assert answer.text == text
            assert answer.end.finish_reason is FinishReason.STOP
            assert answer.completed is not None
            if stop is None:
                assert answer.end.stop_reason == EOS
                assert answer.ids[0] == [*ids, EOS]
                assert answer.completed.usage.completion_tokens == len(ids) + 1
            else:
                assert answer.end.stop_reason == stop
                assert answer.ids[0] == ids[:count]
                assert answer.completed.usage.completion_tokens == count

        for start in range(0, 500, 125):
            await asyncio.gather(*(one(*case) for case in cases[start : start + 125]))
        await server.settled()
        assert server.books.outcomes == {"stop": 500}
        assert server.supervisor.restarts == (1 if faults else 0)

    run(tmp_path, test, mode="echo", tokens_per_step=2, **faults)


def test_started_comes_with_the_first_token_and_completed_last(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        ids = encode("Once upon")
        request = ids_request(ids, max_new_tokens=50, seed=5, request_id="mine")
        events = [event async for event in server.service.generate(request)]
        assert events[0] == Started("mine", "fake", 5)
        assert [event.token_ids for event in events if isinstance(event, TextDelta)] == [(i,) for i in [*ids, EOS]]
        last = events[-1]
        assert isinstance(last, Completed)
        usage, timings = last.usage, last.timings
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
            len(ids),
            len(ids) + 1,
            2 * len(ids) + 1,
        )
        assert 0 <= timings.queue_ms + timings.prefill_ms + timings.decode_ms <= timings.total_ms + 1e-6
        assert server.books.inter_tokens == len(ids)

    run(tmp_path, test, mode="echo", step_seconds=0.01)


def test_defaults_are_the_models_and_seeds_are_drawn(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        sent: list[Any] = []
        send = server.supervisor.send

        def record(message: Any) -> bool:
            sent.append(message)
            return send(message)

        server.supervisor.send = record  # type: ignore[method-assign]
        one = await collect(server.service, GenerationRequest(prompt="a"))
        two = await collect(server.service, GenerationRequest(prompt="a"))
        params = sent[0].params
        assert (params.temperature, params.top_k, params.top_p, params.typical_p) == (0.5, 0, 1.0, 1.0)
        assert params.max_new_tokens == 256
        assert sent[0].prompt_token_ids == [0, *encode("a")]
        assert one.started is not None
        assert two.started is not None
        assert 0 <= one.started.seed < 2**53
        assert one.started.seed != two.started.seed
        assert one.started.id != two.started.id
        await collect(server.service, GenerationRequest(prompt="a", temperature=0.0, top_k=7, add_special_tokens=False))
        assert (sent[2].params.temperature, sent[2].params.top_k) == (0.0, 7)
        assert sent[2].prompt_token_ids == encode("a")
        room = await collect(server.service, ids_request([5] * 4000))
        assert room.completed is not None
        assert room.completed.usage.completion_tokens == 96

    run(tmp_path, test)


def test_min_new_tokens_delays_stop_strings(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        ids = encode("xaxaxa")
        assert len(ids) == 6
        for least, text in ((0, "x"), (2, "x"), (3, "xax"), (5, "xaxax"), (7, "xaxaxa")):
            request = ids_request(ids, max_new_tokens=20, min_new_tokens=least, stop=("a",), ignore_eos=least > 6)
            answer = await collect(server.service, request)
            assert answer.text == text
            assert answer.completed is not None
            assert answer.completed.usage.completion_tokens >= least
        await server.settled()

    run(tmp_path, test, mode="echo")


def test_choices_end_one_by_one(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        prompt = list(range(10, 20))
        answer = await collect(server.service, ids_request(prompt, n=3, max_new_tokens=40, seed=9))
        for choice in range(3):
            assert answer.ids[choice] == expected_tokens(prompt, 9, 40, choice, VOCABULARY)
            assert answer.texts[choice] == decode(answer.ids[choice])
        assert answer.completed is not None
        assert answer.completed.usage.prompt_tokens == 10
        assert answer.completed.usage.completion_tokens == 120
        # A stop of one choice leaves the others alone.
        stop = answer.texts[1][5:8]
        again = await collect(server.service, ids_request(prompt, n=3, max_new_tokens=40, seed=9, stop=(stop,)))
        assert again.texts[1] == answer.texts[1].split(stop)[0]
        assert any(end is not None and end.finish_reason is FinishReason.STOP for end in again.ends)
        await server.settled()
        assert server.books.delivered == 120 + sum(map(len, again.ids))

    run(tmp_path, test)


def test_messages_and_tokenize(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        request = GenerationRequest(messages=({"role": "user", "content": "hi <|end|>"},), max_new_tokens=100)
        ids = await server.service.tokenize(request)
        assert ids.count(EOS) == 0
        answer = await collect(server.service, request)
        assert answer.completed is not None
        assert answer.completed.usage.prompt_tokens == len(ids)
        assert server.service.detokenize(encode("żó")) == "żó"
        for bad in (-1, VOCABULARY):
            with pytest.raises(Refusal, match="vocabulary") as caught:
                server.service.detokenize([5, bad])
            assert caught.value.problems[0].param == "tokens"

    run(tmp_path, test, mode="echo")


def test_answers_hold_no_path(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        answer = await collect(server.service, ids_request([5], max_new_tokens=1))
        assert answer.started is not None
        info = server.service.info()
        assert answer.started.model == info["model"] == info["identity"]["model"] == "model"
        assert str(tmp_path) not in str(info)

    run(tmp_path, test, model=str(tmp_path / "model"))


# Refusals


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ids_request([5], max_new_tokens=100), "max_new_tokens"),
        (ids_request([5], top_k=VOCABULARY + 1), "top_k"),
        (ids_request([5, VOCABULARY]), "prompt_token_ids"),
        (ids_request([-1]), "prompt_token_ids"),
        (ids_request([5], stop_token_ids=(VOCABULARY,)), "stop_token_ids"),
        (ids_request([5], logit_bias={VOCABULARY: 1.0}), "logit_bias"),
        (GenerationRequest(messages=({"role": "pirate", "content": "x"},)), "messages[0].role"),
        (ids_request([5], tools=(TOOL,), tool_choice="required", allowed_token_ids=(5,)), "allowed_token_ids"),
        (ids_request([5], tools=(TOOL,), tool_choice="function:f", stop=("x",)), "stop"),
    ],
)
def test_problems_that_need_no_tokens(tmp_path: Path, request_: GenerationRequest, param: str) -> None:
    async def test(server: Server) -> None:
        assert [problem.param for problem in server.service.problems(request_)] == [param]
        with pytest.raises(Refusal) as caught:
            await collect(server.service, request_)
        assert caught.value.code == "invalid_request"
        assert server.books.outcomes == {"invalid_request": 1}

    run(tmp_path, test, max_model_len=100, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    ("request_", "code", "numbers"),
    [
        (ids_request([]), "invalid_request", ["empty"]),
        (ids_request([5] * 99, max_new_tokens=2), "context_length_exceeded", ["99", "2", "100"]),
        (ids_request([5] * 100), "context_length_exceeded", ["100"]),
        (GenerationRequest(prompt="x" * 5000), "context_length_exceeded", ["5001", "100"]),
        (ids_request([5] * 99, min_new_tokens=5), "invalid_request", ["1"]),
        (GenerationRequest(messages=({"role": "user", "content": "x" * 9000},)), "context_length_exceeded", ["100"]),
    ],
)
def test_problems_that_need_the_tokens(
    tmp_path: Path, request_: GenerationRequest, code: str, numbers: list[str]
) -> None:
    async def test(server: Server) -> None:
        assert server.service.problems(request_) == []
        with pytest.raises(Refusal) as caught:
            await collect(server.service, request_)
        assert caught.value.code == code
        assert all(number in caught.value.problems[0].message for number in numbers)
        assert server.is_clean()

    run(tmp_path, test, max_model_len=100)


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (GenerationRequest(prompt="x", grammar=("regex", "a+"), n=2), "unsupported_grammar", "regex"),
        (GenerationRequest(prompt="x"), "invalid_request", None),
    ],
)
def test_what_the_engine_refuses_is_the_clients_to_mend(
    tmp_path: Path, request_: GenerationRequest, code: str, param: str | None
) -> None:
    """It has the last word: with the model's tokens a grammar may be too complex that was none without them."""

    async def test(server: Server) -> None:
        with pytest.raises(Refusal, match="too much") as caught:
            await collect(server.service, request_)
        assert (caught.value.code, caught.value.problems[0].param) == (code, param)
        assert server.books.outcomes == {code: 1}

    run(tmp_path, test, refuse="it is too much")


def test_the_cache_may_hold_less_than_the_model_allows(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        assert server.service.info()["context_length"] == 65
        with pytest.raises(Refusal, match="65"):
            await collect(server.service, ids_request([5] * 60, max_new_tokens=6))
        await collect(server.service, ids_request([5] * 60, max_new_tokens=5))

    run(tmp_path, test, num_blocks=4, block_size=16)


def test_a_template_error_is_a_problem_of_the_messages(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(TOKENIZER.to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}", encoding="utf-8")

    async def test(server: Server) -> None:
        with pytest.raises(Refusal, match="no system role") as caught:
            await collect(server.service, GenerationRequest(messages=({"role": "user", "content": "x"},)))
        assert caught.value.code == "invalid_request"
        assert caught.value.problems[0].param == "messages"

    run(tmp_path, test, model_path=str(folder))


def test_reservation_is_atomic(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        most = 0

        async def one(i: int) -> str:
            nonlocal most
            try:
                async for _ in server.service.generate(GenerationRequest(prompt=f"{i}", max_new_tokens=5)):
                    most = max(most, server.service.num_open)
            except Refusal as refusal:
                return refusal.code if refusal.retry_after is not None else "no Retry-After"
            return "done"

        outcomes = await asyncio.gather(*(one(i) for i in range(200)))
        assert most == 10
        assert outcomes.count("done") == 10
        assert outcomes.count("queue_full") == 190
        assert server.books.outcomes == {"length": 10, "queue_full": 190}
        with pytest.raises(Refusal):
            await collect(server.service, GenerationRequest(prompt="x", n=11))

    run(tmp_path, test, max_running=4, settings=ServiceSettings(max_waiting=6), step_seconds=0.02)


def test_what_was_spent_is_told_whatever_the_end(tmp_path: Path) -> None:
    spent: list[tuple[str, int]] = []

    async def test(server: Server) -> None:
        server.service._spent = lambda tenant, tokens: spent.append((tenant, tokens))
        whole = GenerationRequest(prompt_token_ids=(5, 6, 7), max_new_tokens=4, tenant="a")
        async for _ in server.service.generate(whole):
            pass
        async with contextlib.aclosing(server.service.generate(dataclasses.replace(whole, tenant="b"))) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    break
        with pytest.raises(Refusal):
            async for _ in server.service.generate(dataclasses.replace(whole, prompt_token_ids=())):
                pass

    run(tmp_path, test)
    assert spent[0] == ("a", 7)
    assert spent[1][0] == "b"
    assert 3 < spent[1][1] <= 7, "the prompt counts even if its reader leaves"
    assert all(tokens == 0 for _, tokens in spent[2:])


def test_a_request_without_a_deadline_has_the_servers(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        assert server.service.info()["defaults"]["deadline_ms"] == 300
        late = await collect(server.service, ids_request([5], max_new_tokens=4000, ignore_eos=True))
        own = await collect(server.service, ids_request([5], max_new_tokens=50, ignore_eos=True, deadline_ms=5000))
        assert (late.end.finish_reason, own.end.finish_reason) == (FinishReason.DEADLINE, FinishReason.LENGTH)
        await server.settled()

    run(tmp_path, test, settings=ServiceSettings(default_deadline_ms=300), step_seconds=0.01)


def test_a_deadline_of_several_prompts_keeps_what_those_have_that_ran(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        long = ids_request([5], max_new_tokens=4000, ignore_eos=True, deadline_ms=300, n=2)
        answer = Answer(4)
        async for event in server.service.generate_together([long, long], "/v1/completions"):
            answer.take(event)
        assert answer.completed is not None
        assert [end.finish_reason for end in answer.ends] == 4 * [FinishReason.DEADLINE]
        first = [len(ids) for ids in answer.ids]
        assert min(first[:2]) > 0
        assert first[2:] == [0, 0]
        usage = answer.completed.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (2, sum(first))
        # Of which none has a token: an error.
        running = asyncio.create_task(
            collect(server.service, ids_request([6], max_new_tokens=60, ignore_eos=True, n=2))
        )
        await asyncio.sleep(0.05)
        server.service._places._drain_rate = DrainRate()
        short = dataclasses.replace(long, deadline_ms=150)
        with pytest.raises(Refusal, match="before the first token"):
            await anext(server.service.generate_together([short, short], "/v1/completions"))
        await running
        assert server.is_clean()
        await server.settled()

    run(tmp_path, test, max_running=2, step_seconds=0.01)


def test_a_deadline_ends_what_runs_and_refuses_what_cannot_be_in_time(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        service = server.service
        late = await collect(service, ids_request([5], max_new_tokens=4000, ignore_eos=True, deadline_ms=300))
        assert late.end.finish_reason is FinishReason.DEADLINE
        assert 0 < len(late.ids[0]) < 4000
        # One runs for long: the next one waits for its place, and its time passes.
        running = asyncio.create_task(collect(service, ids_request([6], max_new_tokens=100, ignore_eos=True)))
        await asyncio.sleep(0.05)
        service._places._drain_rate = DrainRate()  # else it is told at once how long a place may take
        began = time.monotonic()
        with pytest.raises(Refusal, match="before the first token") as caught:
            await collect(service, ids_request([7], max_new_tokens=5, deadline_ms=150))
        assert (caught.value.code, caught.value.problems[0].param) == ("deadline", "deadline_ms")
        assert time.monotonic() - began > 0.14
        # Places have become free every ten seconds lately: nobody is kept waiting to be told.
        now = time.monotonic()
        service._places._drain_rate = DrainRate()
        for ago in (20.0, 10.0):
            service._places._drain_rate.freed(1, now - ago)
        began = time.monotonic()
        with pytest.raises(Refusal) as caught:
            await collect(service, ids_request([7], max_new_tokens=5, deadline_ms=3000))
        assert caught.value.code == "deadline"
        assert time.monotonic() - began < 0.1
        assert (await running).end.finish_reason is FinishReason.LENGTH
        assert server.is_clean()
        assert server.books.outcomes == {"deadline": 3, "length": 1}
        await server.settled()

    run(tmp_path, test, max_running=1, step_seconds=0.01)


def test_while_loading_requests_are_refused(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        assert server.service.state == "loading"
        assert server.service.info() == {"state": "loading", "version": "0.1.0", "engine": {"restarts": 0}}
        for call in (collect(server.service, GenerationRequest(prompt="x")), server.service.tokenize(ids_request([1]))):
            with pytest.raises(Refusal) as caught:
                await call
            assert (caught.value.code, caught.value.retry_after) == ("loading", 2)
        with pytest.raises(Refusal):
            server.service.detokenize([1])

    run(tmp_path, test, wait=False, load_seconds=30.0)


def test_the_service_needs_neither_torch_nor_the_web() -> None:
    code = (
        "import sys, server.service\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'fastapi', 'pydantic', 'starlette'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

"""CudaRunner in Triton's interpreter (or on a GPU): the same tokens as the plain path, whatever is in flight."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kernels.cuda.ops import CudaOps
from kernels.portable import PortableOps
from models.config import ModelConfig
from models.layers import DecoderModel
from models.loader import random_model
from server.engine import cuda_runner
from server.engine.block_table_rows import BlockTableRows
from server.engine.config import SchedulerConfig
from server.engine.core import EngineCore
from server.engine.cuda_runner import CudaRunner
from server.engine.cuda_step import device_faults
from server.engine.memory import decode_buckets
from server.engine.plan import DeviceFault, PlannedRequest, RequestOutput, RowResult, StepPlan
from server.engine.request import FinishReason, Request, SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.scores import unpack_scores
from tests.server.engine.cores import run_all, tokens_of

BLOCK = 16
VOCAB = 97
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


@cache
def tiny() -> tuple[DecoderModel, CudaOps]:
    ops = CudaOps(torch.float32)
    with torch.inference_mode():
        return random_model(ModelConfig.from_hf(CONFIG), ops, seed=1, std=0.3), ops


def make_runner(max_running: int = 8, num_blocks: int = 64, kv_dtype: torch.dtype = torch.float32) -> CudaRunner:
    model, ops = tiny()
    return CudaRunner(
        model,
        ops,
        kv_dtype=kv_dtype,
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_running=max_running,
        max_model_len=256,
        max_tokens_per_step=128,
        eos_token_ids=(2,),
    )


def make_core(runner: Any, depth: int, **settings: int) -> EngineCore:
    values: dict[str, Any] = {"num_blocks": 64, "max_model_len": 256, "max_running": 8, "max_tokens_per_step": 128}
    config = SchedulerConfig(
        **(values | {"block_size": BLOCK, "mixed_step_tokens": 32, "eos_token_ids": (2,), "pipeline_depth": depth})
        | settings
    )
    return EngineCore(runner, Scheduler(config))


@cache
def oracle() -> DecoderModel:
    """The same weights on the CPU's own operators."""
    return random_model(ModelConfig.from_hf(CONFIG), PortableOps(dtype=torch.float32), seed=1, std=0.3)


def expected_tokens(batch: list[Request]) -> list[list[int]]:
    """What these requests, not yet added anywhere, draw on the CPU backend, one step at a time."""
    model = oracle()
    runner = Runner(model, model.ops, 64, BLOCK, (2,))  # type: ignore[attr-defined]
    return tokens(make_core(runner, 1), batch)


def poison(runner: CudaRunner) -> None:
    """NaN in everything that a step must write before it reads."""
    with torch.inference_mode():
        for buffer in (
            runner._logits,
            *(cache.keys for cache in runner.kv_caches),
            *(c.values for c in runner.kv_caches),
        ):
            buffer.fill_(torch.nan)


PARAMS = (
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "presence_penalty": 0.8, "min_new_tokens": 3},
    # Draws 7, 8, 9, ... if the token drawn last counts, else each of them twice.
    {"temperature": 0.0, "presence_penalty": 100.0, "logit_bias": tuple((7 + i, 200.0 - 15 * i) for i in range(5))},
    {"temperature": 0.8, "min_p": 0.05, "logit_bias": ((7, 3.0),)},
)


def requests(count: int, new_tokens: int = 5, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            index,
            [rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 5, 15, 16, 17, 33]))],
            SamplingParams(new_tokens, seed=rng.getrandbits(64), ignore_eos=True, **PARAMS[index % len(PARAMS)]),
            arrival=index,
        )
        for index in range(count)
    ]


def tokens(core: EngineCore, batch: list[Request]) -> list[list[int]]:
    outputs = run_all(core, batch)
    assert core.scheduler.pool.num_used == 0
    return [tokens_of(outputs[request.request_id]) for request in batch]


def test_buckets() -> None:
    assert decode_buckets(1) == [1]
    assert decode_buckets(3) == [1, 2, 4]
    assert decode_buckets(5) == [1, 2, 4, 8]
    assert decode_buckets(33) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert decode_buckets(4096)[-1] == 4096
    assert len(decode_buckets(4096)) < 130


@pytest.mark.parametrize("depth", [1, 2])
def test_the_tokens_are_those_of_the_plain_path(depth: int) -> None:
    """Prompts in chunks beside streams, every kind of sampling, penalties on tokens that the host does not know yet."""
    expected = expected_tokens(requests(7))
    runner = make_runner()
    poison(runner)
    assert tokens(make_core(runner, depth), requests(7)) == expected


class Steps:
    """Stands for a grammar: after a token only the three behind it may follow, so it must be known."""

    def matcher(self, grammar: str) -> Steps:
        return self

    def mask(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.uint32]:
        words = np.zeros(4, dtype=np.uint32)
        last = output_token_ids[-1] if output_token_ids else 10
        for token in range(last + 1, last + 4):
            words[token % VOCAB // 32] |= np.uint32(1 << token % VOCAB % 32)
        return words


@pytest.mark.parametrize("depth", [1, 2])
def test_details_and_what_depends_on_the_last_token(depth: int) -> None:
    """Scores of output and prompt, explanations in the device's own weights, masks and bad words in flight."""

    def batch() -> list[Request]:
        asked: tuple[dict[str, Any], ...] = (
            {"temperature": 1.1, "num_logprobs": 3, "num_prompt_logprobs": 2, "explain": 5, "presence_penalty": 0.5},
            {"temperature": 1.5, "grammar": "steps", "explain": 97},
            {"temperature": 1.2, "bad_words": ((7, 8), (9,), (11, 12, 13)), "allowed_token_ids": tuple(range(7, 14))},
            {"temperature": 0.0, "num_logprobs": 0},
        )
        prompts = ([5] * 40, [6, 7], [8] * 17, [9, 3, 4])
        return [
            Request(i, prompts[i], SamplingParams(6, seed=i, ignore_eos=True, **fields))
            for i, fields in enumerate(asked)
        ]

    def run(runner: Any, depth: int) -> list[list[RequestOutput]]:
        core = make_core(runner, depth)
        core.grammars = Steps()  # type: ignore[assignment]
        return list(run_all(core, batch()).values())

    model = oracle()
    expected = run(Runner(model, model.ops, 64, BLOCK, (2,)), 1)  # type: ignore[attr-defined]
    actual = run(make_runner(), depth)
    assert [tokens_of(outputs) for outputs in actual] == [tokens_of(outputs) for outputs in expected]
    walked = [10, *tokens_of(actual[1])]
    assert all(0 < (after - before) % VOCAB < 4 for before, after in pairwise(walked))
    for ours, theirs in zip(actual, expected, strict=True):
        for name, count in (("scores", 3), ("prompt_scores", 2)):
            a, b = (b"".join(getattr(o.details, name) for o in each if o.details) for each in (ours, theirs))
            count = count if ours is not actual[3] else 0
            for mine, other in zip(unpack_scores(a, count), unpack_scores(b, count), strict=True):
                assert mine.top_ids == other.top_ids
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        for explanation in (e for o in ours if o.details for e in o.details.explanations):
            target = explanation.random * explanation.total >> 31
            drawn = [c.token_id for c in explanation.candidates if c.start <= target < c.end]
            assert drawn == [explanation.token_id]
    assert sum(len(o.details.explanations) for outputs in actual for o in outputs if o.details) == 12


def test_preemption_changes_nothing() -> None:
    expected = expected_tokens(requests(3, new_tokens=7, seed=3))
    core = make_core(make_runner(), 2)
    batch = requests(3, new_tokens=7, seed=3)
    steps = iter(range(1000))

    def preempt_now_and_then() -> None:
        step = next(steps)
        if step in (4, 6):
            core.scheduler.preempt(step // 2 - 2)

    outputs = run_all(core, batch, preempt_now_and_then)
    assert [tokens_of(outputs[request.request_id]) for request in batch] == expected
    assert sum(request.num_preemptions for request in batch) == 2


def decode_plan(step: int, count: int, lengths: list[int]) -> StepPlan:
    """One decode step by hand: request i has blocks i and 40 + i, and K and V from whatever was written there."""
    planned = []
    for index in range(count):
        request = Request(1000 + index, [3 + index] * lengths[index], SamplingParams(4, temperature=0.0))
        blocks = (index, 40 + index)[: -(-lengths[index] // BLOCK)]
        planned.append(PlannedRequest(request, lengths[index] - 1, 1, blocks, samples=True, output_index=0))
    return StepPlan(step, tuple(planned))


def test_a_row_draws_the_same_in_every_bucket_and_padding_touches_nothing() -> None:
    rng = random.Random(5)
    lengths = [rng.choice([1, 2, 15, 16, 17, 31]) for _ in range(33)]
    model, ops = tiny()
    plain = Runner(model, ops, 80, BLOCK, (2,))  # the same ops without buckets or static buffers
    runner = make_runner(max_running=33, num_blocks=80)
    with torch.inference_mode():
        buffers = [(mine, other) for a, b in zip(runner.kv_caches, plain.kv_caches, strict=True)
                   for mine, other in ((a.keys, b.keys), (a.values, b.values))]  # fmt: skip
        for mine, other in buffers:
            other.copy_(torch.randn(other.shape))
            mine.copy_(other)
        before = [mine.clone() for mine, _ in buffers]
    expected = plain.run(decode_plan(0, 33, lengths))
    # Every bucket with its fewest and most rows; up to 8, and so for four buckets, every number between.
    for count in (*range(1, 10), 16, 17, 24, 25, 32, 33):
        assert runner.launch(decode_plan(0, count, lengths)).result().rows == expected.rows[:count]
        others = [*range(count, 40), *range(40 + count, 80)]
        for (mine, _), old in zip(buffers, before, strict=True):
            assert torch.equal(mine[others], old[others])
    for mine, other in buffers:
        assert torch.equal(mine, other)


def test_a_row_that_is_not_finite_ends_alone() -> None:
    model, _ = tiny()
    runner = make_runner()
    forward = model.forward
    neighbours = [request for request in requests(3, new_tokens=4) if request.request_id != 1]
    expected = expected_tokens(neighbours)
    used = {token for request in requests(3, new_tokens=4) for token in request.prompt_token_ids}.union(*expected)
    bad = next(token for token in range(3, VOCAB) if token not in used)

    def poisoned(token_ids: Tensor, kv_caches: Any, plan: Any) -> Tensor:
        hidden = forward(token_ids, kv_caches, plan)
        return hidden + torch.where(token_ids == bad, torch.nan, 0.0)[:, None]

    batch = requests(3, new_tokens=4)
    # It draws the bad token at once, and is poisoned by it while the next step is in flight.
    batch[1].params = SamplingParams(6, temperature=0.0, logit_bias=((bad, 1000.0),), ignore_eos=True)
    model.forward = poisoned  # type: ignore[method-assign]
    try:
        outputs = run_all(make_core(runner, 2), batch)
    finally:
        del model.forward  # type: ignore[method-assign]
    assert outputs[1][-1].finish_reason is FinishReason.ERROR
    assert tokens_of(outputs[1]) == [bad]
    assert [tokens_of(outputs[i]) for i in (0, 2)] == expected


def test_a_failed_launch_leaves_the_next_steps_sound() -> None:
    expected = expected_tokens(requests(3, new_tokens=6))
    runner = make_runner()
    launch, ops, calls = runner._decode.stage, tiny()[1], [0]

    def failing(*arguments: Any) -> None:
        launch(*arguments)
        calls[0] += len(arguments[1]) > 1  # alone, every request gets through
        if len(arguments[1]) > 1 and calls[0] in (2, 3):
            raise torch.OutOfMemoryError("planted")

    runner._decode.stage = failing  # type: ignore[method-assign]
    assert tokens(make_core(runner, 2), requests(3, new_tokens=6)) == expected
    assert calls[0] > 3
    assert ops.upload._used == 0


def test_device_faults() -> None:
    for error in (
        torch.AcceleratorError("CUDA error: an illegal memory access"),
        RuntimeError("Triton Error [CUDA]: x"),
    ):
        with pytest.raises(DeviceFault), device_faults():
            raise error
    for harmless in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shape"), ValueError("CUDA error")):
        with pytest.raises(type(harmless)), device_faults():
            raise harmless


def test_warm_up_runs_every_bucket_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ops = tiny()
    penalties = SamplingParams(2, temperature=0.0, repetition_penalty=1.1)
    monkeypatch.setattr("server.engine.cuda_runner._WARM_PARAMS", (penalties,))
    runner = CudaRunner(
        model, ops, kv_dtype=torch.float32, num_blocks=32, block_size=BLOCK, max_running=2, max_model_len=64,
        max_tokens_per_step=4, eos_token_ids=(2,),
    )  # fmt: skip
    done: list[float] = []
    runner.run_worst_case()
    runner.compile_kernels(done.append)
    runner.capture_graphs()
    assert done == sorted(done)
    core = make_core(runner, 2, num_blocks=32, max_model_len=64, max_running=2, max_tokens_per_step=4)
    batch = [Request(i, [5, 6, 7], SamplingParams(3, temperature=0.0, ignore_eos=True)) for i in range(2)]
    again = [Request(i, [5, 6, 7], SamplingParams(3, temperature=0.0, ignore_eos=True)) for i in range(2)]
    assert tokens(core, batch) == expected_tokens(again)


class OddTokens:
    """Grammars of sorts, and their matcher: after each token only odd ones."""

    def matcher(self, grammar: str) -> OddTokens:
        return self

    def mask(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.uint32]:
        return np.full(-(-VOCAB // 32), 0xAAAAAAAA, dtype=np.uint32)


def test_warm_up_compiles_what_masks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant is a kernel with its constants, the types of its tensors and which of them are missing; and of the
    integers that Triton specializes on, whether they are 1 or a multiple of 16."""
    launched: set[tuple[object, ...]] = set()
    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        loose = self.kwargs.get("do_not_specialize") or ()

        def kind(name: str, value: Any) -> object:
            if isinstance(value, torch.Tensor):
                return value.dtype
            constant = "constexpr" in str(inspect.signature(self.fn).parameters[name].annotation)
            if not isinstance(value, int) or isinstance(value, bool) or constant:
                return value
            return "int" if name in loose else (value == 1, value % 16 == 0)

        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launched.add((self.__name__, *((name, kind(name, values.get(name))) for name in self.arg_names)))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    masked = tuple(params for params in cuda_runner._WARM_PARAMS if params.grammar)
    monkeypatch.setattr(cuda_runner, "_WARM_PARAMS", masked)
    model, ops = tiny()
    runner = CudaRunner(
        model, ops, kv_dtype=torch.float32, num_blocks=32, block_size=BLOCK, max_running=2, max_model_len=64,
        max_tokens_per_step=4, eos_token_ids=(2,),
    )  # fmt: skip
    runner.compile_kernels()
    compiled = set(launched)
    launched.clear()
    core = make_core(runner, 2, num_blocks=32, max_model_len=64, max_running=2, max_tokens_per_step=4)
    core.grammars = OddTokens()  # type: ignore[assignment]
    batch = [Request(i, [5, 6], SamplingParams(2, temperature=0.9, grammar="odd", ignore_eos=True)) for i in range(2)]
    assert all(token % 2 for drawn in tokens(core, batch) for token in drawn)
    assert any(name == "_mask" for name, *_ in launched)
    assert {variant for variant in launched if variant[0] == "_mask"} <= compiled
    assert {name for name, *_ in launched} <= {name for name, *_ in compiled}


# ---- block tables ----


def planned(request: Request, *block_ids: int) -> PlannedRequest:
    return PlannedRequest(request, 0, 1, block_ids, samples=True, output_index=0)


def a_request(request_id: int) -> Request:
    return Request(request_id, [1], SamplingParams(1))


def test_only_new_blocks_are_written() -> None:
    rows = BlockTableRows(2)
    a, b, c = (a_request(i) for i in range(3))
    (ra,), updates = rows.assign([planned(a, 5, 6)])
    assert updates == [(ra, 0, 5), (ra, 1, 6)]
    assert rows.assign([planned(a, 5, 6)]) == ([ra], [])
    assert rows.assign([planned(a, 5, 6, 9)]) == ([ra], [(ra, 2, 9)])
    (_, rb), updates = rows.assign([planned(a, 5, 6, 9), planned(b, 7)])
    assert updates == [(rb, 0, 7)]
    # A third request takes the row that was not used for the longest time.
    rows.assign([planned(b, 7)])
    assert rows.assign([planned(c, 8)]) == ([ra], [(ra, 0, 8)])
    assert rows.assign([planned(a, 5)]) == ([rb], [(rb, 0, 5)])


def test_a_row_is_written_anew_after_a_preemption_or_a_failure_and_for_another_request_of_that_id() -> None:
    rows = BlockTableRows(2)
    a = a_request(0)
    rows.assign([planned(a, 5, 6)])
    a.num_preemptions += 1
    assert rows.assign([planned(a, 8, 6)])[1] == [(0, 0, 8), (0, 1, 6)]
    rows.forget()
    assert rows.assign([planned(a, 8, 6)])[1] == [(0, 0, 8), (0, 1, 6)]
    assert rows.assign([planned(a_request(0), 3)])[1] == [(0, 0, 3)]
    assert RowResult(1, (2,)).error is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles on a GPU only")
def test_nothing_is_compiled_after_the_warm_up() -> None:
    runner = make_runner(max_running=33)
    runner.run_worst_case()
    runner.compile_kernels()
    runner.capture_graphs()
    with counted_compilations() as compiled:
        tokens(make_core(runner, 2, max_running=33), requests(40, new_tokens=30))
    assert compiled == []


def counted_compilations() -> Any:
    from contextlib import contextmanager

    import triton

    @contextmanager
    def counting() -> Iterator[list[Any]]:
        compiled: list[Any] = []
        triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["repr"])
        try:
            yield compiled
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None

    return counting()

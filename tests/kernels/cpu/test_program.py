"""A recorded forward pass gives the bits of the pass itself, for other tokens and plans, and refuses what it lacks."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.cpu.ops import CpuOps
from kernels.cpu.program import Program
from kernels.ops import AttentionMetadata, AttentionPlan
from models.config import ModelConfig
from models.loader import new_model, random_model
from tests.server.engine.cores import TINY

BLOCK_SIZE = 16
ONES = torch.ones(32)
# One of each family whose forward pass is another; heads of 16, which all of them take.
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 199,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt-neox": TINY | {"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "stablelm": TINY
    | {"architectures": ["StableLmForCausalLM"], "layer_norm_eps": 1e-5, "use_parallel_residual": True},
    "gemma3": TINY | {"architectures": ["Gemma3ForCausalLM"], "hidden_act": "gelu_pytorch_tanh", "head_dim": 16},
    "qwen3-moe": TINY
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "num_experts": 9,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
    },
    # As many heads of k as of q: both norms have results of one shape.
    "olmo2": TINY | {"architectures": ["Olmo2ForCausalLM"], "num_key_value_heads": 4},
}
QWEN3 = TINY | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24}


@pytest.mark.parametrize("config", [TINY, QWEN3, *FAMILIES.values()], ids=["llama", "qwen3", *FAMILIES])
@pytest.mark.parametrize("mode", ["none", "w8a8"])
def test_a_program_gives_the_bits_of_the_pass(config: dict[str, object], mode: str) -> None:
    ops, rng = CpuOps(2), random.Random(0)
    plain = random_model(ModelConfig.from_hf(config), ops, seed=1, std=0.2)
    if mode != "none":
        plain = _quantized(config, ops)
    caches, twins = (
        [ops.allocate_kv_cache(spec, 32) for spec in plain.kv_cache_specs(16, torch.bfloat16)] for _ in "ab"
    )
    program = ops.record(lambda ids, plan: plain.forward(ids, twins, plan), max_tokens=40, block_size=BLOCK_SIZE)
    assert isinstance(program, Program)
    lengths = [0, 0, 0]
    tables = [list(range(10 * s, 10 * s + 10)) for s in range(3)]
    for _ in range(12):
        new = [rng.choice([1, 1, 1, 2, 9]) for _ in lengths]
        lengths = [a + b for a, b in zip(lengths, new, strict=True)]
        plan = ops.plan(AttentionMetadata(new, lengths, tables, BLOCK_SIZE))
        ids = torch.tensor([rng.randrange(199) for _ in range(sum(new))])
        assert torch.equal(program(ids, plan), plain.forward(ids, caches, plan))


def _quantized(config: dict[str, object], ops: CpuOps) -> object:
    from models.loader import fill, random_tensors

    model_config = ModelConfig.from_hf(config)
    model = new_model(model_config, ops, "w8a8")
    slots = model.slots()
    fill(slots, random_tensors(slots, model_config, seed=1, std=0.2))
    return model


def test_what_is_not_an_operation_is_refused() -> None:
    """It would run while recording and never again; a view of a tensor is no computation."""
    ops = CpuOps(1)
    weight = ops.prepare_linear(torch.randn(8, 8), embedding=True)

    def scaled(ids: Tensor, plan: AttentionPlan) -> Tensor:
        return ops.embedding(ids, weight) * 2

    with pytest.raises(RuntimeError, match="operator mul would run once"):
        ops.record(scaled, 4, BLOCK_SIZE)
    program = ops.record(lambda ids, plan: ops.embedding(ids, weight)[:, 2:4], 4, BLOCK_SIZE)
    ids = torch.tensor([3, 1, 7])
    plan = ops.plan(AttentionMetadata([3], [3], [[0]], BLOCK_SIZE))
    assert torch.equal(program(ids, plan), ops.embedding(ids, weight)[:, 2:4])


def test_plans_beyond_what_was_recorded_are_refused() -> None:
    ops = CpuOps(1)
    model = random_model(ModelConfig.from_hf(TINY | {"max_position_embeddings": 32}), ops, seed=1)
    caches = [ops.allocate_kv_cache(spec, 3) for spec in model.kv_cache_specs(16, torch.bfloat16)]
    program = ops.record(lambda ids, plan: model.forward(ids, caches, plan), 4, BLOCK_SIZE)

    def call(new: int, length: int, table: list[int], ids: int) -> None:
        program(torch.zeros(ids, dtype=torch.int64), ops.plan(AttentionMetadata([new], [length], [table], BLOCK_SIZE)))

    call(4, 4, [2], 4)
    with pytest.raises(ValueError, match="up to 4 fit"):
        call(5, 5, [0], 5)
    with pytest.raises(ValueError, match="the plan 4 tokens"):
        call(4, 4, [0], 3)
    with pytest.raises(ValueError, match="block 3, kv_cache has 3"):
        call(1, 1, [3], 1)
    with pytest.raises(ValueError, match="rotary has 32 positions"):
        call(1, 33, [0, 1, 2], 1)


def test_many_short_programs_in_a_row() -> None:
    """The threads meet after every operation; none may take part in the next program too early or too late."""
    ops = CpuOps(3)
    weight = ops.prepare_linear(torch.randn(64, 32), embedding=True)
    programs = [
        ops.record(lambda ids, plan, n=n: _chain(ops, ids, weight, n), 8, BLOCK_SIZE)  # type: ignore[misc]
        for n in (1, 2, 5)
    ]
    ids = torch.arange(8)
    plan = ops.plan(AttentionMetadata([8], [8], [[0]], BLOCK_SIZE))
    expected = [_chain(ops, ids, weight, n) for n in (1, 2, 5)]
    for _ in range(700):
        for program, want in zip(programs, expected, strict=True):
            assert torch.equal(program(ids, plan), want)


def _chain(ops: CpuOps, ids: Tensor, weight: object, count: int) -> Tensor:
    """`count` operations, each of which needs all of the one before."""
    x = ops.embedding(ids, weight)  # type: ignore[arg-type]
    for _ in range(count - 1):
        x = ops.rms_norm(x, ONES, 1e-6)  # type: ignore[assignment]
    return x


def test_an_engine_starts_without_torchs_compiler() -> None:
    # Importing it takes longer than all else that a small model needs to start.
    script = (
        "import sys; from server.engine.build import build_engine; from server.engine.config import EngineConfig; "
        "build_engine(EngineConfig(model='stet-tales', device='cpu')); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

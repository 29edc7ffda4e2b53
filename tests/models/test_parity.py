"""Our models against transformers, float32: the same greedy tokens, the same logits, through the paged KV cache."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_greedy import greedy
from torch import Tensor

from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.portable import PortableOps
from kernels.reference import ReferenceOps
from models.config import ModelConfig
from models.layers import DecoderModel
from models.loader import load_model, resolve_model, save_random_checkpoint
from models.rotary import rotary_table

with warnings.catch_warnings():
    # transformers and what it imports warn about their own deprecations; those are not ours to fix.
    warnings.simplefilter("ignore")
    import transformers

TOLERANCE = 1e-4
NUM_TOKENS = 64
PROMPT_TOKENS = 45  # three blocks of 16, the last one partly filled

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Families whose token vectors outweigh what two random layers add: such a model repeats a few tokens.
SMALL_TABLES = ("GPT2", "Gemma2", "Gemma3Text", "Olmo2", "Granite")
SEEDS = {"gpt2-4x4x16": 14}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# family, heads, KV heads, head size, what else is set
CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "llama-8x8x16": ("Llama", 8, 8, 16, {}),
    "llama-8x4x32-tied-biases": (
        "Llama",
        8,
        4,
        32,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-9x3x64-tied": ("Llama", 9, 3, 64, {"tie_word_embeddings": True}),  # the shape of SmolLM2-135M
    "llama-4x1x80": ("Llama", 4, 1, 80, {}),
    "llama-8x2x32-llama3-rope": ("Llama", 8, 2, 32, {"rope_parameters": LLAMA3}),
    "llama-4x2x32-linear-rope": (
        "Llama",
        4,
        2,
        32,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2-4x2x32-yarn-rope": (
        "Qwen2",
        4,
        2,
        32,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral-8x2x16-window": ("Mistral", 8, 2, 16, {"sliding_window": 24}),
    "mistral-12x4x32": ("Mistral", 12, 4, 32, {"sliding_window": None}),
    "mistral-4x4x96-head-dim": ("Mistral", 4, 4, 96, {"sliding_window": None, "hidden_size": 128}),
    "qwen2-4x2x64-tied": ("Qwen2", 4, 2, 64, {"tie_word_embeddings": True}),
    "qwen2-12x4x16": ("Qwen2", 12, 4, 16, {}),
    "qwen2-4x1x32-some-windows": (
        "Qwen2",
        4,
        1,
        32,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3-4x2x32-head-dim-tied": ("Qwen3", 4, 2, 32, {"hidden_size": 64, "tie_word_embeddings": True}),
    "qwen3-8x8x16": ("Qwen3", 8, 8, 16, {}),
    "qwen3-9x3x96-bias": ("Qwen3", 9, 3, 96, {"hidden_size": 72, "attention_bias": True}),
    "smollm3-4x2x32-nope": ("SmolLM3", 4, 2, 32, {"no_rope_layer_interval": 2}),
    "gpt2-4x4x16": ("GPT2", 4, 4, 16, {"n_inner": 176}),
    "gpt2-6x6x16-exact-gelu": ("GPT2", 6, 6, 16, {"activation_function": "gelu"}),
    "gpt-neox-4x4x32": ("GPTNeoX", 4, 4, 32, {}),
    "gpt-neox-4x4x16-sequential": (
        "GPTNeoX",
        4,
        4,
        16,
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": ROPE | {"partial_rotary_factor": 1},
        },
    ),
    "gemma2-4x2x32": (
        "Gemma2",
        4,
        2,
        32,
        {"hidden_size": 72, "sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "gemma3-4x1x32": (
        "Gemma3Text",
        4,
        1,
        32,
        {
            "hidden_size": 72,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": ROPE,
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    "phi3-4x2x32-window": ("Phi3", 4, 2, 32, {"sliding_window": 24}),
    "phi3-4x4x32-longrope-tied": (
        "Phi3",
        4,
        4,
        32,
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + i / 10 for i in range(12)],
                "long_factor": [2.0 + i for i in range(12)],
            },
        },
    ),
    "olmo2-4x4x16": ("Olmo2", 4, 4, 16, {}),
    "olmo2-8x2x16": ("Olmo2", 8, 2, 16, {}),
    "granite-4x2x32-tied": (
        "Granite",
        4,
        2,
        32,
        {
            "tie_word_embeddings": True,
            "mlp_bias": True,
            "attention_multiplier": 0.21,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.5,
        },
    ),
    "mixtral-4x2x32": (
        "Mixtral",
        4,
        2,
        32,
        {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3-moe-4x2x32": (
        "Qwen3Moe",
        4,
        2,
        32,
        {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
    ),
    "qwen3-moe-4x2x16-normalized": (
        "Qwen3Moe",
        4,
        2,
        16,
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "stablelm-4x2x32-biases": ("StableLm", 4, 2, 32, {"use_qkv_bias": True}),
    "stablelm-4x4x16-parallel": ("StableLm", 4, 4, 16, {"use_parallel_residual": True}),
}


@functools.cache
def cpu_ops() -> Ops:
    return CpuOps(1)


@functools.cache
def portable_ops() -> Ops:
    return PortableOps(dtype=torch.float32)


BACKENDS: dict[str, Callable[[], Ops]] = {"reference": ReferenceOps, "cpu": cpu_ops, "portable": portable_ops}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only makes each operation wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(BACKENDS))
def ops(request: pytest.FixtureRequest) -> Ops:
    return BACKENDS[request.param]()


@dataclass
class Oracle:
    """What transformers makes of a checkpoint: for each prompt the new ids and the logits of all positions."""

    folder: Path
    prompts: list[list[int]]
    ids: list[list[int]]
    logits: list[Tensor]


@torch.inference_mode()
def consult(model: Any, folder: Path, prompts: list[list[int]]) -> Oracle:
    """Greedy decoding with transformers' own cache, then all positions once more without it."""
    ids, logits = [], []
    for prompt in prompts:
        new: list[int] = []
        cache, step = None, torch.tensor([prompt])
        while len(new) < NUM_TOKENS:
            output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            new.append(int(output.logits[0, -1].argmax()))
            cache, step = output.past_key_values, torch.tensor([new[-1:]])
        ids.append(new)
        logits.append(model(torch.tensor([prompt + new[:-1]])).logits[0])
    return Oracle(folder, prompts, ids, logits)


@pytest.fixture(scope="module", params=list(CASES))
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    family, num_heads, num_kv_heads, head_dim, extra = CASES[request.param]
    sizes: dict[str, Any] = {
        "vocab_size": 307,
        "hidden_size": num_heads * head_dim,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family in ("GPT2", "GPTNeoX", "Phi3", "Olmo2", "Granite", "StableLm"):  # it follows from the hidden size
        del sizes["head_dim"]
    if family in ("GPT2", "GPTNeoX"):  # without groups of queries
        del sizes["num_key_value_heads"]
    if family == "GPT2":
        del sizes["intermediate_size"]
    torch.manual_seed(SEEDS.get(request.param, 11))
    config = getattr(transformers, f"{family}Config")(**(sizes | extra))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention is peaked and every weight matters
            scale = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[1] ** 0.5
            parameter.add_(torch.randn_like(parameter) * scale)
        if family in SMALL_TABLES:
            model.get_input_embeddings().weight.mul_(0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return consult(model, folder, some_prompts(307))


def some_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (PROMPT_TOKENS, 17)]


def compare(got: tuple[list[int], Tensor], oracle: Oracle, index: int) -> None:
    ids, logits = got
    difference = (logits - oracle.logits[index][: len(logits)]).abs().max()
    assert difference < TOLERANCE
    assert ids == oracle.ids[index][: len(ids)]


@pytest.mark.parametrize(("chunks", "num_tokens"), [(1, NUM_TOKENS), (2, 8)])
def test_same_tokens_and_logits(oracle: Oracle, ops: Ops, chunks: int, num_tokens: int) -> None:
    """Alone: the prompt in one chunk and in two, each followed by single tokens."""
    model = load_model(oracle.folder, ops)
    (got,) = greedy(model, ops, oracle.prompts[:1], num_tokens, chunks)
    assert len(got[0]) == num_tokens
    compare(got, oracle, 0)


def test_same_tokens_and_logits_in_a_batch(oracle: Oracle, ops: Ops) -> None:
    """Two sequences of different lengths in every step, their blocks interleaved in the pool."""
    model = load_model(oracle.folder, ops)
    for index, got in enumerate(greedy(model, ops, oracle.prompts, NUM_TOKENS, chunks=3)):
        compare(got, oracle, index)


def test_the_oracle_says_something(oracle: Oracle) -> None:
    """A model that repeats itself or does not look back would make the comparisons above easy."""
    assert len(set(oracle.ids[0])) >= 8
    assert oracle.logits[0].std() > 0.3


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 8.0},
        LLAMA3 | {"original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "beta_fast": 16},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "truncate": False,
        },
    ],
)
def test_rotary_tables(scaling: dict[str, Any]) -> None:
    """The angles of a long context, up to the last position."""
    head_dim = 80
    source = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=4 * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
        rope_parameters=scaling | {"rope_theta": 500000.0},
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(source)
    cos, sin = embedding(torch.zeros(1), torch.arange(131072)[None])
    table = rotary_table(ModelConfig.from_hf(json.loads(source.to_json_string())), torch.device("cpu"))
    assert (table.cos - cos[0, :, : head_dim // 2]).abs().max() < 1e-6
    assert (table.sin - sin[0, :, : head_dim // 2]).abs().max() < 1e-6


@pytest.fixture(scope="module")
def tales() -> Oracle:
    folder = resolve_model("stet-tales")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return consult(model, folder, some_prompts(model.config.vocab_size))


def test_built_in_model(tales: Oracle, ops: Ops) -> None:
    model = load_model(tales.folder, ops)
    for index, (ids, logits) in enumerate(greedy(model, ops, tales.prompts, NUM_TOKENS, chunks=2)):
        used = used_ids(model)
        assert (logits[:, :used] - tales.logits[index][:, :used]).abs().max() < TOLERANCE
        assert ids == tales.ids[index]


def used_ids(model: DecoderModel) -> int:
    """Ids that the model has not masked."""
    hidden = torch.zeros(1, model.config.hidden_size)
    return int((model.logits(hidden)[0] > -1e30).sum())


def test_random_checkpoint_is_the_random_model(tmp_path: Path) -> None:
    """What save_random_checkpoint writes, transformers computes alike: a peer can run the same weights."""
    source = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        dtype="float32",
    )
    hf_config = json.loads(source.to_json_string(use_diff=False)) | {"architectures": ["Qwen3ForCausalLM"]}
    save_random_checkpoint(hf_config, tmp_path, seed=3, std=0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ops = ReferenceOps()
    prompt = list(range(40))
    ((_, logits),) = greedy(load_model(tmp_path, ops), ops, [prompt], 1)
    with torch.inference_mode():
        assert (logits - model(torch.tensor([prompt])).logits[0]).abs().max() < TOLERANCE

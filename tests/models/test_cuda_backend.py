"""Whole models on the Triton kernels (in the interpreter where there is no GPU) beside the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_greedy import greedy
from tokenizers import Tokenizer

from kernels.cuda.ops import CudaOps
from kernels.ops import QuantizationMode
from kernels.reference import ReferenceOps
from models.config import ModelConfig
from models.loader import load_model, random_model, resolve_model

# architecture, heads, KV heads, head size, what else is set: every feature that a kernel must know of
CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "llama-3x1x64-biases-tied": (
        "Llama",
        3,
        1,
        64,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-2x2x80": ("Llama", 2, 2, 80, {}),
    "mistral-4x2x96-window": ("Mistral", 4, 2, 96, {"sliding_window": 20}),
    "qwen3-4x2x128": ("Qwen3", 4, 2, 128, {}),
    "gpt2-2x2x36": ("GPT2", 2, 2, 36, {}),
    "gpt-neox-2x2x32": ("GPTNeoX", 2, 2, 32, {"hidden_act": "gelu"}),
    "gemma2-2x1x64": (
        "Gemma2",
        2,
        1,
        64,
        {"hidden_act": None, "sliding_window": 20, "attn_logit_softcapping": 5.0, "tie_word_embeddings": True},
    ),
    "gemma3-2x1x32": (
        "Gemma3",
        2,
        1,
        32,
        {"hidden_act": None, "sliding_window": 20, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    ),
    "phi3-2x1x32-partial": ("Phi3", 2, 1, 32, {"partial_rotary_factor": 0.75}),
    "olmo2-2x1x36": ("Olmo2", 2, 1, 36, {}),
    "granite-2x1x36": (
        "Granite",
        2,
        1,
        36,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    ),
    "stablelm-2x1x32-parallel": ("StableLm", 2, 1, 32, {"use_parallel_residual": True, "use_qkv_bias": True}),
    "mixtral-2x1x32": (
        "Mixtral",
        2,
        1,
        32,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 80, "hidden_size": 80},
    ),
    "qwen3-moe-2x1x32": (
        "Qwen3Moe",
        2,
        1,
        32,
        {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "hidden_size": 80},
    ),
    "smollm3-2x1x64-nope": ("SmolLM3", 2, 1, 64, {"no_rope_layer_interval": 2, "no_rope_layers": [1, 0]}),
}


def config(case: str) -> ModelConfig:
    family, heads, kv_heads, head_dim, extra = CASES[case]
    return ModelConfig.from_hf(
        {
            "architectures": ["GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"],
            "vocab_size": 101,
            "hidden_size": 72,
            "n_embd": 72,
            "intermediate_size": 136,
            "num_hidden_layers": 2,
            "n_layer": 2,
            "num_attention_heads": heads,
            "n_head": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 128,
            "n_positions": 128,
            "rms_norm_eps": 1e-5,
            "layer_norm_eps": 1e-5,
            "layer_norm_epsilon": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        }
        | extra
    )


def prompts(vocab_size: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("case", list(CASES))
def test_same_tokens_and_logits_in_float32(case: str) -> None:
    """Two prompts in two chunks, then decode: greedy ids equal, logits within 1e-4."""
    reference, ops = ReferenceOps(), CudaOps(torch.float32)
    model_config = config(case)
    expected = greedy(random_model(model_config, reference, 3, 0.1), reference, prompts(101, (33, 7)), 3, 2)
    actual = greedy(random_model(model_config, ops, 3, 0.1), ops, prompts(101, (33, 7)), 3, 2)
    for (ids, logits), (expected_ids, expected_logits) in zip(actual, expected, strict=True):
        assert ids == expected_ids
        torch.testing.assert_close(logits.cpu(), expected_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["none", "w8a16", "w8a8"])
def test_the_embedded_model_in_bfloat16(mode: QuantizationMode) -> None:
    """A trained model in bfloat16, as it is and in int8, beside the float32 reference in the same mode.

    Its logits are as near as bfloat16 allows, and wherever the reference's choice is not a close one it is the same.
    """
    path = resolve_model("stet-tales")
    reference, ops = ReferenceOps(), CudaOps(torch.bfloat16)
    text = "Once upon a time there was a little fox who loved the garden. One day the fox found a"
    story = [Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids]
    expected = greedy(load_model(path, reference, quantization=mode), reference, story, 2)[0][1]
    actual = greedy(load_model(path, ops, quantization=mode), ops, story, 2)[0][1].cpu()
    error = (actual - expected).norm() / expected.norm()
    assert error < 0.03, f"logits differ by {error:.3f} of their norm: more than bfloat16 explains"
    best, second = expected.topk(2).values.unbind(-1)
    clear = best - second > 0.5
    assert clear.sum() > 10
    assert torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])

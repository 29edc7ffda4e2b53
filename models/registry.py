"""From a Hugging Face architecture name to the class that runs it. Imports no model, and no torch, until asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.ops import Ops, QuantizationMode
    from models.config import ModelConfig
    from models.layers import DecoderModel

    ModelClass = Callable[[ModelConfig, Ops, QuantizationMode, Callable[[str], bool] | None], DecoderModel]

# Architecture name in config.json -> "module:class". One class may serve several names: those differ only in what
# models.config reads from their configuration.
ARCHITECTURES: dict[str, str] = {
    "GPT2LMHeadModel": "models.gpt2:GPT2",
    "GPTNeoXForCausalLM": "models.gpt_neox:GPTNeoX",
    "Gemma2ForCausalLM": "models.gemma:Gemma",
    "Gemma3ForCausalLM": "models.gemma:Gemma",
    "GraniteForCausalLM": "models.llama:Llama",
    "LlamaForCausalLM": "models.llama:Llama",
    "MistralForCausalLM": "models.llama:Llama",
    "MixtralForCausalLM": "models.mixtral:Mixtral",
    "Olmo2ForCausalLM": "models.olmo2:Olmo2",
    "Phi3ForCausalLM": "models.llama:Llama",
    "Qwen2ForCausalLM": "models.llama:Llama",
    "Qwen3ForCausalLM": "models.llama:Llama",
    "Qwen3MoeForCausalLM": "models.mixtral:Mixtral",
    "SmolLM3ForCausalLM": "models.llama:Llama",
    "StableLmForCausalLM": "models.gpt_neox:StableLM",
}


def supported_architectures() -> tuple[str, ...]:
    """The architecture names that can be loaded, in alphabetical order."""
    return tuple(sorted(ARCHITECTURES))


def check_architecture(architecture: str) -> None:
    """Raise ModelError, with the list of what is supported, if `architecture` is unknown."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(supported_architectures())
        raise ModelError(f"architecture {architecture!r} is not supported; choose a model with one of: {known}")


def model_class(architecture: str) -> ModelClass:
    """The class of `architecture`, called as `cls(config, ops, quantization, keep)`. Raises ModelError if unknown."""
    check_architecture(architecture)
    module, _, name = ARCHITECTURES[architecture].partition(":")
    make: ModelClass = getattr(importlib.import_module(module), name)
    return make

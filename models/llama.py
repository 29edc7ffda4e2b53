"""The Llama decoder (arXiv:2302.13971, arXiv:2407.21783) and the families that vary it by a few flags.

Mistral adds a sliding window, Qwen2 biases on q, k and v, Qwen3 a norm over each head of q and k, SmolLM3 layers
without rotation; SmolLM and SmolLM2 are plain Llama. Phi-3 (arXiv:2404.14219) has q, k and v in one tensor, as gate and
up; Granite has factors on token vectors, scores, residuals and logits. All of these are read from ModelConfig.
"""

from __future__ import annotations

from models.decoder import PreNormDecoder, PreNormLayer
from models.slots import Precision


class Llama(PreNormDecoder[PreNormLayer]):
    """A stack of pre-norm decoder layers with RMSNorm and a gated feed-forward layer."""

    def layer(self, number: int, precision: Precision) -> PreNormLayer:
        """Make one layer."""
        return PreNormLayer(self.config, self.ops, number, precision)

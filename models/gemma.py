"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786): norms before and after each part, token
vectors scaled, GeGLU, windows in most layers. Gemma 2 caps scores and logits; Gemma 3 norms q and k instead, and layers
with a window rotate by a base of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.ops import AttentionPlan, KVCache, Ops
from models.config import ModelConfig
from models.decoder import Decoder, PreNormLayer
from models.layers import Norm
from models.slots import Precision, Slot


class _GemmaLayer(PreNormLayer):
    """Attention and a feed-forward layer, each between two norms."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, precision: Precision) -> None:
        super().__init__(config, ops, layer, precision)
        self.after_attention = Norm(config, ops, config.hidden_size)
        self.after_mlp = Norm(config, ops, config.hidden_size)

    def slots(self, prefix: str) -> dict[str, Slot]:
        """Those of a pre-norm layer, and the norms after its parts."""
        slots = super().slots(prefix) | self.after_attention.slots(prefix + self.names.after_attention_norm)
        return slots | self.after_mlp.slots(prefix + self.names.after_mlp_norm)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.after_attention.nbytes + self.after_mlp.nbytes


class Gemma(Decoder[_GemmaLayer]):
    """A stack of decoder layers with four norms each."""

    def layer(self, number: int, precision: Precision) -> _GemmaLayer:
        """Make one layer."""
        return _GemmaLayer(self.config, self.ops, number, precision)

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] -> hidden states after the last norm, [T, H]; see models.layers.DecoderModel."""
        residual = self.embed(token_ids)
        first = self.layers[0]
        x = first.attention_norm(residual, first.attention.qkv.quantizes_input)
        next_norms = [(layer.attention_norm, layer.attention.qkv.quantizes_input) for layer in self.layers[1:]]
        next_norms.append((self.norm, False))
        for layer, rotary, cache, (next_norm, quantize) in zip(
            self.layers, self.rotary_tables, kv_caches, next_norms, strict=True
        ):
            x = layer.after_attention(layer.attention(x, rotary, cache, plan))
            x, residual = layer.mlp_norm.add(x, residual, layer.mlp.quantizes_input)
            x = layer.after_mlp(layer.mlp(x))
            x, residual = next_norm.add(x, residual, quantize)
        return x

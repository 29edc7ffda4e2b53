"""GPT-NeoX (arXiv:2204.06745), which Pythia is, and StableLM: LayerNorm, a part of each head rotated, and attention and
feed-forward layer side by side or, in some models, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionPlan, KVCache
from models.config import ModelConfig
from models.decoder import PreNormDecoder, PreNormLayer
from models.layers import Attention
from models.slots import Precision, Slot


class _SharedNormLayer(PreNormLayer):
    """Its feed-forward layer reads what its attention reads."""

    def slots(self, prefix: str) -> dict[str, Slot]:
        """Without a second norm."""
        slots = self.attention_norm.slots(prefix + self.names.attention_norm) | self.attention.slots()
        return slots | self.mlp.slots()

    @property
    def nbytes(self) -> int:
        return self.attention_norm.nbytes + self.attention.nbytes + self.mlp.nbytes


class StableLM(PreNormDecoder[PreNormLayer]):
    """Sequential layers, or parallel ones with one norm for both parts."""

    def layer(self, number: int, precision: Precision) -> PreNormLayer:
        """Make one layer."""
        kind = _SharedNormLayer if self.config.norms == 1 else PreNormLayer
        return kind(self.config, self.ops, number, precision)

    def through_layers(self, residual: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """The residual stream [T, H] before the first layer -> hidden states after the last norm, [T, H]."""
        if not self.config.parallel_residual:
            return super().through_layers(residual, kv_caches, plan)
        shared = self.config.norms == 1
        # Where both parts read one norm's result, its consumers may want it in two forms: then neither is fused.
        first = self.layers[0]
        x = first.attention_norm(residual, self._fuses(first))
        next_norms = [(layer.attention_norm, self._fuses(layer)) for layer in self.layers[1:]]
        next_norms.append((self.norm, False))
        for layer, rotary, cache, (next_norm, quantize) in zip(
            self.layers, self.rotary_tables, kv_caches, next_norms, strict=True
        ):
            packed = layer.attention.qkv(x)
            # After `qkv`, which has used x: a norm's result is valid until the next one.
            inner = x if shared else layer.mlp_norm(residual, layer.mlp.quantizes_input)
            residual = self.ops.add(layer.attention.attend(packed, rotary, cache, plan), residual)
            x, residual = next_norm.add(layer.mlp(inner), residual, quantize)
        return x

    def _fuses(self, layer: PreNormLayer) -> bool:
        """Whether the norm before attention hands over quantized activations."""
        own = layer.attention.qkv.quantizes_input
        return own and (self.config.norms > 1 or layer.mlp.quantizes_input)


class GPTNeoX(StableLM):
    """The same with two norms, and with q, k and v in one tensor, head by head."""

    def layer(self, number: int, precision: Precision) -> PreNormLayer:
        """Make one layer."""
        layer = PreNormLayer(self.config, self.ops, number, precision)
        layer.attention = Attention(self.config, self.ops, number, precision, order=_by_kind(self.config))
        return layer


def _by_kind(config: ModelConfig) -> Tensor:
    """Where each row of query_key_value goes, int64 [3 * H]: rows come as [heads, (q, k, v), D] and are wanted as
    [(q, k, v), heads, D]."""
    heads, dim = config.num_heads, config.head_dim
    return torch.arange(3 * heads * dim).view(3, heads, dim).transpose(0, 1).flatten()

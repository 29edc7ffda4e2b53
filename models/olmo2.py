"""OLMo 2 (arXiv:2501.00656): a norm after attention and after the feed-forward layer and none before them, and a norm
over all heads of q and of k."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.ops import AttentionPlan, KVCache, Ops
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import MLP, Attention, Norm
from models.slots import Precision, Slot


class _PostNormLayer:
    """Attention and a feed-forward layer, each before a norm."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, precision: Precision) -> None:
        self.names = config.names
        self.attention = Attention(config, ops, layer, precision)
        self.after_attention = Norm(config, ops, config.hidden_size)
        self.mlp = MLP(config, ops, layer, precision)
        self.after_mlp = Norm(config, ops, config.hidden_size)

    def slots(self, prefix: str) -> dict[str, Slot]:
        """The names of `models.families.Names`, in the order of the computation."""
        slots = self.attention.slots() | self.after_attention.slots(prefix + self.names.after_attention_norm)
        return slots | self.mlp.slots() | self.after_mlp.slots(prefix + self.names.after_mlp_norm)

    @property
    def nbytes(self) -> int:
        return self.attention.nbytes + self.after_attention.nbytes + self.mlp.nbytes + self.after_mlp.nbytes


class Olmo2(Decoder[_PostNormLayer]):
    """A stack of post-norm decoder layers."""

    def layer(self, number: int, precision: Precision) -> _PostNormLayer:
        """Make one layer."""
        return _PostNormLayer(self.config, self.ops, number, precision)

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] -> hidden states after the last norm, [T, H]; see models.layers.DecoderModel."""
        stream = self.embed(token_ids)
        for layer, rotary, cache in zip(self.layers, self.rotary_tables, kv_caches, strict=True):
            stream = self.ops.add(layer.after_attention(layer.attention(stream, rotary, cache, plan)), stream)
            stream = self.ops.add(layer.after_mlp(layer.mlp(stream)), stream)
        x: Tensor = self.norm(stream)
        return x

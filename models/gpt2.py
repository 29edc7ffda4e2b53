"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): learned positions, LayerNorm,
and weights that its checkpoints hold transposed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.ops import AttentionPlan, KVCache, QuantizedWeight
from models.decoder import PreNormDecoder, PreNormLayer
from models.layers import MLP, Attention
from models.slots import Precision, Rows, Slot


class GPT2(PreNormDecoder[PreNormLayer]):
    """A stack of pre-norm decoder layers over token vectors and position vectors."""

    positions: Tensor

    def layer(self, number: int, precision: Precision) -> PreNormLayer:
        """Make one layer."""
        layer = PreNormLayer(self.config, self.ops, number, precision)
        layer.attention = Attention(self.config, self.ops, number, precision, transposed=True)
        layer.mlp = MLP(self.config, self.ops, number, precision, transposed=True)
        return layer

    def slots(self) -> dict[str, Slot]:
        """Those of the decoder, and the position vectors [P, H]."""
        shape = (self.config.max_position_embeddings, self.config.hidden_size)
        rows = Rows(shape)

        def put(start: int, piece: Tensor | QuantizedWeight) -> None:
            rows.put(start, piece)
            if rows.complete:
                self.positions = rows.take().to(self.ops.device, self.ops.dtype)

        return {"transformer.wpe.weight": Slot(shape, put, shape[0] * shape[1])} | super().slots()

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] -> hidden states after the last norm, [T, H]; see models.layers.DecoderModel."""
        residual = self.ops.add_positions(self.embed(token_ids), self.positions, plan)
        return self.through_layers(residual, kv_caches, plan)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as prepared, rotary tables (which rotate by nothing) and positions included."""
        return super().weight_bytes + self.positions.nbytes

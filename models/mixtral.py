"""Mixtral (arXiv:2401.04088) and Qwen3-MoE (arXiv:2505.09388): Llama and Qwen3 with a mixture of experts in place of
each feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from kernels.ops import Activations, ExpertWeight, Ops, QuantizationMode, QuantizedWeight
from models.config import ModelConfig
from models.decoder import PreNormDecoder, PreNormLayer
from models.layers import MLP, Linear
from models.slots import Precision, Slot


class Mixtral(PreNormDecoder[PreNormLayer]):
    """A stack of pre-norm decoder layers, the experts of which are chosen token by token."""

    def layer(self, number: int, precision: Precision) -> PreNormLayer:
        """Make one layer."""
        layer = PreNormLayer(self.config, self.ops, number, precision)
        layer.mlp = Experts(self.config, self.ops, number, precision)
        return layer


class Experts(MLP):
    """A router and its experts, gate_up and down of all of them stacked. The router stays unquantized: it is small, and
    a choice that tips is no small error."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, precision: Precision) -> None:
        names = config.names
        self.ops = ops
        self.prefix = prefix = names.layer.format(layer)
        self.activation, self.gated = config.activation, config.gated
        self.top_k, self.normalize = config.experts_per_token, config.normalize_experts
        hidden, inner, count = config.hidden_size, config.intermediate_size, config.num_experts
        experts = [names.expert.format(expert) for expert in range(count)]
        gate_up = {expert + part: inner for expert in experts for part in names.gate_up}
        down = {expert + names.down: hidden for expert in experts}
        self.router = Linear(ops, hidden, {names.router: count}, False, "none")
        first = _Stacked(ops, hidden, gate_up, precision.of(prefix, gate_up), count)
        second = _Stacked(ops, inner, down, precision.of(prefix, down), count)
        self.gate_up, self.down = first, second
        self._stacked = first, second

    def slots(self) -> dict[str, Slot]:
        """The slots of the router and of every expert."""
        return self.router.slots(self.prefix) | super().slots()

    def __call__(self, x: Activations) -> Tensor:
        """x [T, H], unquantized -> [T, H]."""
        gate_up, down = self._stacked
        router = self.router.weight
        return self.ops.experts(x, router, gate_up.experts, down.experts, self.top_k, self.normalize)

    @property
    def quantizes_input(self) -> bool:
        """No: the router takes x as it is."""
        return False

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + super().nbytes


class _Stacked(Linear):
    """The weights of all experts as one, [E * N, K]."""

    def __init__(
        self, ops: Ops, in_features: int, parts: dict[str, int], mode: QuantizationMode, num_experts: int
    ) -> None:
        super().__init__(ops, in_features, parts, False, mode)
        self.num_experts = num_experts
        self.experts: ExpertWeight

    def prepare(self, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> None:
        """Take all weights at once."""
        self.experts = self.ops.prepare_experts(weight, self.num_experts, self.mode)

    @property
    def nbytes(self) -> int:
        """Bytes as prepared."""
        return self.experts.nbytes

"""Bytes of a model's weights, KV cache and activations, as the backends keep them, from its configuration alone.

The layouts are those of kernels/cpu/linear.py, kernels/portable/linear.py and kernels/cuda/linear.py; a test holds the
sums to what the backends say of models that they have loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kernels.sizes import SCALE_BYTES, kv_bytes_per_block
from models.config import ModelConfig

ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_LANES = 16  # output features of a panel in the compiled CPU kernels


@dataclass(frozen=True, slots=True)
class Backend:
    """How a device keeps a model.

    name              "cpu" (the compiled kernels), "portable" (torch's operators) or "cuda", as in /info
    weight_dtype      what weights that are not quantized become; None: they stay as the checkpoint has them
    activation_dtype  of activations, and of the weights of norms
    kv_dtypes         --kv-cache-dtype -> the checkpoint's dtype -> what K and V are stored as; what is not to be had is
                      left out
    modes             the quantization modes that there are
    block_size        tokens of a KV block
    dot_group         cpu: how many input features of a w8a8 weight lie side by side
    keeps_table       whether an unquantized table of token vectors is kept twice: packed, and by rows to be looked up
    """

    name: Literal["cpu", "portable", "cuda"]
    weight_dtype: str | None
    activation_dtype: str
    kv_dtypes: Mapping[str, Mapping[str, str]]
    modes: tuple[str, ...]
    block_size: int
    dot_group: int = 4
    keeps_table: bool = False


@dataclass(frozen=True, slots=True)
class LinearShape:
    """`count` weights [n, k] of a model. `role`: "layer" (read in every step, once a layer), "head" or "table".

    A tied head and table are one weight of the role "head" that is an `embedding` as well. `kept`: unquantized in every
    mode, because an int8 checkpoint has it so, or always. `experts`: of how many experts it is made, `used` of which a
    token goes through.
    """

    name: str
    n: int
    k: int
    bias: bool
    count: int
    role: Literal["layer", "head", "table"]
    embedding: bool = False
    kept: bool = False
    experts: int = 1
    used: int = 1

    @property
    def num_weights(self) -> int:
        """Of all `count`."""
        return self.n * self.k * self.count

    def share(self, rows: int) -> float:
        """What part of the weight `rows` tokens go through, if they choose their experts independently."""
        return 1.0 - (1.0 - self.used / self.experts) ** rows if self.experts > 1 else 1.0

    def rows_of_expert(self, rows: int) -> int:
        """How many of `rows` tokens go through an expert that is in use, on the average."""
        return max(1, round(rows * self.used / (self.experts * self.share(rows))))


def linear_shapes(config: ModelConfig) -> list[LinearShape]:
    """Every weight of a model that is multiplied or looked up, stacked as models/layers.py stacks them."""
    hidden, inner, layers, names = config.hidden_size, config.intermediate_size, config.num_layers, config.names
    q, kv, up = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, 1 + config.gated
    shapes = {
        names.qkv[0]: LinearShape("qkv", q + 2 * kv, hidden, config.attention_bias, layers, "layer"),
        names.output: LinearShape("output", hidden, q, config.attention_output_bias, layers, "layer"),
        names.gate_up[0]: LinearShape("gate_up", up * inner, hidden, config.mlp_bias, layers, "layer"),
        names.down: LinearShape("down", hidden, inner, config.mlp_bias, layers, "layer"),
    }
    if count := config.num_experts:
        expert = names.expert.format(0)
        for module in (names.gate_up[0], names.down):
            one = shapes.pop(module)
            shapes[expert + module] = replace(one, n=one.n * count, experts=count, used=config.experts_per_token)
        shapes[names.router] = LinearShape("router", count, hidden, False, layers, "layer", kept=True)
    table = LinearShape("table", config.vocab_size, hidden, False, 1, "table", embedding=True)
    if config.tie_word_embeddings:
        shapes[names.table] = replace(table, name="head", role="head")
    else:
        shapes[names.table] = table
        shapes[names.head] = LinearShape("head", config.vocab_size, hidden, False, 1, "head")
    return [part for module, shape in shapes.items() for part in _split_kept(config, module, shape)]


def _split_kept(config: ModelConfig, module: str, shape: LinearShape) -> list[LinearShape]:
    """The shape, or what of it is int8 in the checkpoint and what is not."""
    stored = config.quantization
    if stored is None or shape.kept:
        return [shape]
    prefix = config.names.layer
    names = [prefix.format(layer) + module for layer in range(shape.count)] if shape.role == "layer" else [module]
    kept = sum(not stored.covers(name) for name in names)
    parts = [replace(shape, count=shape.count - kept), replace(shape, count=kept, kept=True)]
    return [part for part in parts if part.count]


def linear_bytes(shape: LinearShape, mode: str, backend: Backend, stored_dtype: str) -> int:
    """Bytes of all `count` weights as prepared: values with padding, scales and biases."""
    n, k = shape.n, shape.k
    itemsize = ITEMSIZE[backend.weight_dtype or stored_dtype]
    # The compiled kernels add biases to their float32 sums; the others keep them in the type that they compute in.
    bias = n * ITEMSIZE[backend.activation_dtype] if shape.bias else 0
    rows = -(-n // _LANES) * _LANES if backend.name == "cpu" else n
    if mode == "none" or shape.kept:
        weight = rows * k * itemsize
        if backend.keeps_table and shape.embedding:
            weight *= 2
    else:
        columns = k
        if backend.name == "cpu" and mode == "w8a8":
            columns = -(-k // backend.dot_group) * backend.dot_group
        weight = rows * columns + n * SCALE_BYTES
    return (weight + bias) * shape.count


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model in memory by part. linears: token table and head included; rotary: cosines and sines, and
    learned positions."""

    linears: int
    norms: int
    rotary: int

    @property
    def total(self) -> int:
        """What the server reports as stet_memory_bytes{kind="weights"}."""
        return self.linears + self.norms + self.rotary


def weight_bytes(config: ModelConfig, mode: str, backend: Backend) -> WeightBytes:
    """The weights of a model in a quantization mode."""
    linears = sum(linear_bytes(shape, mode, backend, config.dtype) for shape in linear_shapes(config))
    itemsize = ITEMSIZE[backend.activation_dtype]
    norms = config.norm_values * (4 if config.norm_offset else itemsize)
    # float32 cos and sin of every position, once for each kind of layer; position vectors beside them.
    rotary = config.rotary_tables * 2 * config.max_position_embeddings * (config.rotary_dim // 2) * 4
    if config.learned_positions:
        rotary += config.max_position_embeddings * config.hidden_size * itemsize
    return WeightBytes(linears, norms, rotary)


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """A KV block of all layers together: a server.engine.memory.BlockSpec."""

    block_size: int
    bytes_per_block: int

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, K and V."""
        return self.bytes_per_block // self.block_size


def kv_block(config: ModelConfig, kv_dtype: str, block_size: int) -> BlockBytes:
    """What a block of `block_size` tokens takes. kv_dtype: what K and V are stored as."""
    heads, dim, itemsize = config.num_kv_heads, config.head_dim, ITEMSIZE[kv_dtype]
    layer = kv_bytes_per_block(heads, dim, block_size, itemsize, quantized=kv_dtype == "int8")
    return BlockBytes(block_size, config.num_layers * layer)


def workspace_bytes(config: ModelConfig, backend: Backend, max_tokens: int, max_rows: int) -> int:
    """Activations of the largest step, an estimate: `max_tokens` tokens through one layer, `max_rows` rows of logits.

    Counted is what a layer's operators hand on: the residual stream twice, the norm's and the output's rows, q, k and v
    before and q after the rotation, attention's output, gate, up and their product.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    values = 4 * config.hidden_size + 3 * q + 2 * kv + 3 * config.intermediate_size
    if config.num_experts:  # of each expert of a token gate, up, their product, and what it makes
        values += 3 * (config.experts_per_token - 1) * config.intermediate_size
        values += config.experts_per_token * config.hidden_size
    logits = max_rows * config.vocab_size * 4
    return max_tokens * values * ITEMSIZE[backend.activation_dtype] + logits

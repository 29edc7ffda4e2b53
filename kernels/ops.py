"""The contract between a model and a device.

A backend (`ReferenceOps`, `PortableOps`, `CudaOps`) is an object built once. It owns its workspaces and the layout of
prepared weights and of the KV cache; the model sees only the methods below. Shapes use these letters:

    T   tokens in this step, of all sequences, back to back      R   rows to sample
    S   sequences in this step                                   V   vocabulary size
    H   hidden size        Hq, Hkv  query and key/value heads    D   head size
    N, K  output and input features of a linear layer            I   intermediate size

Row invariance is part of the contract of every method: the result of a row (a token, a sequence, a row to sample) has
the same bits whatever other rows are in the call, and a token's K and V have the same bits whether its prompt arrived
whole, in chunks, or was computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.sizes import kv_bytes_per_block

QuantizationMode = Literal["none", "w8a16", "w8a8"]


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one layer needs to remember of one token.

    `sliding_window` is the number of most recent tokens (itself included) that a query attends to, or None for all.
    `dtype` is that of K and V as stored; torch.int8 adds one float32 scale for each token and head, of K and of V
    (symmetric, `kernels.int8`).
    """

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    sliding_window: int | None = None

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block (`block_size` tokens, K and V) takes in this layer."""
        quantized = self.dtype == torch.int8
        return kv_bytes_per_block(self.num_kv_heads, self.head_dim, self.block_size, self.dtype.itemsize, quantized)


class KVCache(Protocol):
    """One layer's K and V for `num_blocks` blocks. The layout belongs to the backend that allocated it."""

    @property
    def spec(self) -> KVCacheSpec:
        """What this layer remembers of a token."""
        ...

    @property
    def num_blocks(self) -> int:
        """How many blocks were allocated."""
        ...


class LinearWeight(Protocol):
    """A weight of shape [N, K], in the layout and precision of the backend that prepared it."""

    @property
    def out_features(self) -> int:
        """N."""
        ...

    @property
    def in_features(self) -> int:
        """K."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes as prepared, scales, bias and padding included."""
        ...


class ExpertWeight(Protocol):
    """The weights of E experts, each of shape [N, K], in the layout and precision of the backend that prepared them."""

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that they take as prepared, scales and padding included."""
        ...


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight that is int8 already: it is about values * scales[:, None].

    values: int8 [N, K]; scales: float32 [N], one an output feature (`kernels.int8`).
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return tuple(self.values.shape)


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of the rotary embedding (RoFormer, arXiv:2104.09864), scaling already applied.

    cos, sin: float32 [max_positions, rotary_dim / 2]. The halves of a head's first `rotary_dim` elements are rotated
    against each other (the `rotate_half` convention of the Hugging Face checkpoints); the rest passes unchanged.
    """

    cos: Tensor
    sin: Tensor

    @property
    def rotary_dim(self) -> int:
        """How many elements at the start of each head are rotated."""
        return 2 * int(self.cos.shape[1])


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each token of a step stands and where its sequence's K and V lie. Host integers, no device work.

    Sequence s has `query_lens[s]` new tokens, which are the last of its `seq_lens[s]` tokens; those before are in the
    cache already. Token positions, and the slots to write, follow from that:
    position = seq_len - query_len + i, slot = block_table[position // block_size] * block_size + position % block_size.

    query_lens   new tokens of each sequence, each >= 1; sum T
    seq_lens     tokens of each sequence, new ones included
    block_tables ids of the blocks of each sequence, at least ceil(seq_len / block_size) of them
    """

    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    block_size: int


@dataclass(frozen=True, slots=True)
class QuantizedActivations:
    """Activations as the integer products take them: x is about values * scales[:, None].

    values: int8 [T, K]; scales: float32 [T], one a token (`kernels.int8`). A row that held a NaN or an infinity has a
    scale that is not finite, so that whatever is computed from it is not finite either.
    """

    values: Tensor
    scales: Tensor


# What goes into a linear layer: [T, K] in the backend's dtype or, where asked for, QuantizedActivations. Only `linear`
# looks inside.
Activations = Tensor | Any

# What a backend makes of AttentionMetadata once a step, for all layers: index tensors on its device, in its layout.
AttentionPlan = Any


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """How each of R rows is to be sampled. Host values; a backend moves what it needs in one upload.

    Per row, length R:
      seeds          64-bit seed, 0 <= seed < 2^64
      positions      index of the drawn token in its output (0 for the first); with the seed and the choice it is the
                     whole state of the random generator
      choices        index of the choice among the n of its request
      temperatures   0 is exact argmax (lowest id on a tie)
      top_ks         0 is off
      top_ps, typical_ps   1.0 is off;  min_ps  0.0 is off
      repetition_penalties 1.0 is off;  presence_penalties, frequency_penalties  0.0 is off

    Sparse, row index first:
      biases         (row, token id, value added to the logit); -inf forbids a token (`min_new_tokens`, bad words)
      allowed        row -> the only token ids allowed
      masks          row -> uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 is set where id i is allowed (grammars)
      prompt_tokens, output_tokens   row -> token ids so far, present only for rows with a penalty that is on
    """

    seeds: Sequence[int]
    positions: Sequence[int]
    choices: Sequence[int]
    temperatures: Sequence[float]
    top_ks: Sequence[int]
    top_ps: Sequence[float]
    min_ps: Sequence[float]
    typical_ps: Sequence[float]
    repetition_penalties: Sequence[float]
    presence_penalties: Sequence[float]
    frequency_penalties: Sequence[float]
    biases: Sequence[tuple[int, int, float]] = ()
    allowed: dict[int, Sequence[int]] = field(default_factory=dict)
    prompt_tokens: dict[int, Sequence[int]] = field(default_factory=dict)
    output_tokens: dict[int, Sequence[int]] = field(default_factory=dict)
    masks: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """token_ids: int64 [R]; undefined where `finite` is false.

    finite: bool [R]: false where the row's logits, before any filter, held a NaN or an infinity.
    """

    token_ids: Tensor
    finite: Tensor


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """Natural logarithms of raw probabilities; undefined for a row that is not finite.

    logprobs      float32 [R]: of each row's token
    top_ids       int64 [R, n]: the n most likely tokens, most likely first, the lower id first on a tie
    top_logprobs  float32 [R, n]: theirs
    """

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class Ops(Protocol):
    """Every operation that a decoder needs, for one device.

    Activations are [T, ...] in `dtype` on `device`. Methods return new tensors unless they say that they write in
    place; a returned tensor may live in a workspace of the backend and is valid until the next call of the same
    method. Bad input raises ValueError that names the argument.
    """

    device: torch.device
    dtype: torch.dtype
    fallbacks: Counter[str]
    """How often an operator had to take a path slower than its own, by operator: counted where it is decided, once for
    each weight, shape or step concerned. Only ever counted up."""

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        """Take a weight [N, K] (and bias [N]) in its checkpoint's dtype; return it in this backend's layout.

        "w8a16" and "w8a8" store int8 with one float32 scale an output feature (`kernels.int8`); a weight that is
        quantized already is taken as it is, in these modes only. A mode that the backend does not have raises
        ValueError. embedding: whether `embedding` is to read rows of it (with tied embeddings, besides `linear`).
        """
        ...

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> KVCache:
        """Allocate one layer's cache, zeroed."""
        ...

    def plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        """Prepare what `write_kv` and `paged_attention` need in every layer of this step. Call once a step."""
        ...

    def embedding(self, token_ids: Tensor, weight: LinearWeight, scale: float = 1.0) -> Tensor:
        """token_ids int64 [T], weight [V, H], prepared with `embedding` -> its rows [T, H], dequantized and times
        `scale`, rounded once."""
        ...

    def add_positions(self, x: Tensor, table: Tensor, plan: AttentionPlan) -> Tensor:
        """x [T, H] + the rows of table [P, H] at the tokens' positions: learned positions (GPT-2). A sequence of more
        than P tokens is refused."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, H] -> x + residual. Its memory may be that of `residual`, as with `add_rms_norm`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, quantize: bool = False) -> Activations:
        """x [T, H] -> x / sqrt(mean(x^2) + eps) * weight, statistics in float32 (arXiv:1910.07467).

        With `quantize`, here and below, the result is made QuantizedActivations in the same pass: for a w8a8 linear.
        """
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (rms_norm(x + residual), x + residual); the sum is never quantized."""
        ...

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> Activations:
        """x [T, H] -> (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, statistics in float32, the variance that
        of all H elements (arXiv:1607.06450)."""
        ...

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (layer_norm(x + residual), x + residual); the sum is never quantized."""
        ...

    def norm_query_key(
        self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """query [T, Hq * D], key [T, Hkv * D], possibly views of one packed projection -> each normalized by `rms_norm`
        over all its heads together (OLMo 2), with weights [Hq * D] and [Hkv * D]."""
        ...

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """x [T, K] -> x @ W^T + bias, [T, N], accumulated in float32 or wider.

        A w8a8 weight quantizes an x that is not quantized yet; every other weight refuses one that is.
        """
        ...

    def prepare_experts(
        self, weight: Tensor | QuantizedWeight, num_experts: int, mode: QuantizationMode = "none"
    ) -> ExpertWeight:
        """Take the weights of E experts, one after the other along the rows, [E * N, K]; as `prepare_linear` otherwise.
        N must be a multiple of 16."""
        ...

    def experts(
        self,
        x: Tensor,
        router: LinearWeight,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """A mixture of experts with gated linear units (arXiv:2401.04088): x [T, H] -> [T, H].

        router: an unquantized weight [E, H]; gate_up: [2 * I, H] for each expert, gate first; down: [H, I]. Each token
        goes through the `top_k` experts of the largest logits x @ router^T, in float32, the lower index first on a tie.
        They weigh what a softmax over all logits gives them or, with `normalize`, over theirs. The result is the sum of
        weight * down(silu(gate(x)) * up(x)) from the first expert to the last, in float32, rounded once.
        """
        ...

    def silu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> silu(gate) * up, [T, I] (SwiGLU, arXiv:2002.05202)."""
        ...

    def gelu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> gelu(gate) * up, [T, I]: GeGLU with the tanh form of gelu
        (arXiv:1606.08415), x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
        ...

    def gelu(self, x: Tensor, tanh: bool, quantize: bool = False) -> Activations:
        """x [T, I] -> gelu(x), [T, I] (arXiv:1606.08415): in its tanh form, as in `gelu_mul`, or exactly,
        x / 2 * (1 + erf(x / sqrt(2)))."""
        ...

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [R, V] -> cap * tanh(logits / cap) (Gemma 2). cap must be positive."""
        ...

    def write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: RotaryTable,
        kv_cache: KVCache,
        plan: AttentionPlan,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Normalize (if asked) and rotate query and key, write key and value to their slots, return the query.

        query [T, Hq, D], key and value [T, Hkv, D], possibly views of one packed projection; query_norm, key_norm:
        weights [D] of a per-head RMSNorm that precedes the rotation (Qwen3), given together. Returns [T, Hq, D].
        """
        ...

    def paged_attention(
        self,
        query: Tensor,
        kv_cache: KVCache,
        plan: AttentionPlan,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of each token over its own sequence, read from the cache, its own K and V included.

        query [T, Hq, D] -> [T, Hq * D]. Query head h reads KV head h // (Hq / Hkv). Scores are scaled, then capped by
        softcap * tanh(score / softcap) if given; softmax and sums in float32. The layer's sliding window is in
        `kv_cache.spec`.
        """
        ...

    def record(
        self, forward: Callable[[Tensor, AttentionPlan], Tensor], max_tokens: int, block_size: int
    ) -> Callable[[Tensor, AttentionPlan], Tensor]:
        """A function that does what `forward` does, perhaps faster: it may call it now, once, and write down what it
        asks for.

        forward(token_ids int64 [T], plan) -> [T, ...] calls methods of this object and looks at tensors in other ways;
        it computes by no other means and does not depend on values. T is up to `max_tokens`, plans have blocks of
        `block_size`. The result of a call is valid until the next one.
        """
        ...

    def sample(self, logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None) -> SampleResult:
        """logits [R, V] -> one token a row, by the integer rule of docs/design.md ("Sampling").

        pending: int64 [R] on the device: for each row, the last token of its output where the host did not know it yet
        when it wrote `metadata.output_tokens` (a step in flight draws it), else -1. Penalties count it.

        Order: bias, allowed ids and masks, penalties, temperature, top-k, top-p, min-p, typical-p. A row's NaN touches
        no other row. A row of which every token is forbidden gives id 0.
        """
        ...

    def log_probabilities(self, logits: Tensor, token_ids: Tensor, count: int) -> LogProbabilities:
        """Of token_ids int64 [R] and of the `count` most likely tokens, from logits [R, V] as they came: before any
        bias, penalty, temperature or filter. `count` is 0 to V (the CUDA backend: up to 1024)."""
        ...

    def token_weights(self, scaled: npt.NDArray[np.float32], maximum: np.float32) -> npt.NDArray[np.int64]:
        """The integer weights that `sample` gives to a row [V] of finite logits or -inf, after temperature, on the
        host: trunc(exp(l - max) * 2^36), by this backend's own exp. For explanations; slow."""
        ...

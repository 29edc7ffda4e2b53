"""How fast a model should be: the parts of a step, from its sizes and the device's rates."""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig
from server.planner.rates import Rates
from server.planner.sizes import Backend, LinearShape, kv_block, linear_bytes, linear_shapes


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of the engine, by part. `tokens` is what it brings: drawn, or of a prompt."""

    tokens: int
    linears: float
    attention: float
    elementwise: float
    sampling: float
    overhead: float

    @property
    def seconds(self) -> float:
        """The parts follow one another."""
        return self.linears + self.attention + self.elementwise + self.sampling + self.overhead

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.tokens / self.seconds

    @property
    def slowest(self) -> str:
        """The part that takes longest."""
        parts = ("linears", "attention", "elementwise", "sampling", "overhead")
        return max(parts, key=lambda part: float(getattr(self, part)))


@dataclass(frozen=True, slots=True)
class SpeedModel:
    """A model on a device in one quantization mode, its K and V stored as `kv_dtype`."""

    config: ModelConfig
    backend: Backend
    rates: Rates
    mode: str
    kv_dtype: str

    def decode(self, sequences: int, context: int) -> StepTime:
        """A step in which `sequences` sequences draw a token each, with `context` tokens in the cache."""
        seen = sequences * sum(layers * min(context, window or context) for window, layers in self._windows())
        linears = self._rows(sequences, draws=sequences)
        overhead = self.rates.overhead(self.config.num_layers, sequences)
        return self._step(sequences, linears, seen, seen, sequences, overhead, decode=True)

    def prefill(self, prompt: int, max_tokens_per_step: int) -> StepTime:
        """A prompt of so many tokens, alone, in as many steps as it takes; the last one draws the first token."""
        steps = -(-prompt // max_tokens_per_step)
        last = prompt - (steps - 1) * max_tokens_per_step
        linears = (steps - 1) * self._rows(max_tokens_per_step, draws=0) + self._rows(last, draws=1)
        pairs = read = 0
        for window, layers in self._windows():
            # Token i sees i + 1 tokens, or as many as the window holds.
            full = min(window or prompt, prompt)
            pairs += layers * (full * (full + 1) // 2 + (prompt - full) * full)
            # Each step reads what is in the cache, or the window and the step's own tokens.
            growing = min(full // max_tokens_per_step + 1, steps) if window else steps
            read += layers * max_tokens_per_step * (growing * (growing + 1) // 2)
            read += layers * (steps - growing) * (full + max_tokens_per_step)
        overhead = steps * self.rates.overhead(self.config.num_layers, 1)
        return self._step(prompt, linears, pairs, read, 1, overhead, decode=False)

    def _windows(self) -> list[tuple[int | None, int]]:
        """Each window, and how many layers have it."""
        config = self.config
        sliding = sum(config.sliding_layers)
        return [(None, config.num_layers - sliding), (config.sliding_window, sliding)]

    def _rows(self, tokens: int, draws: int) -> float:
        """Seconds of the products of one step: `tokens` rows through the layers, `draws` through the head."""
        shapes = [shape for shape in linear_shapes(self.config) if shape.role != "table"]
        sizes = [self._read_bytes(shape) for shape in shapes]
        seconds = 0.0
        for shape, num_bytes in zip(shapes, sizes, strict=True):
            if rows := draws if shape.role == "head" else tokens:
                mode = "none" if shape.kept else self.mode
                share, of_expert = shape.share(rows), shape.rows_of_expert(rows)
                weights, read = round(shape.num_weights * share), round(num_bytes * share)
                seconds += self.rates.linear(mode, weights, read, sum(sizes), of_expert)
        return seconds

    def _step(
        self, tokens: int, linears: float, pairs: int, read: int, draws: int, overhead: float, decode: bool
    ) -> StepTime:
        """pairs: of a query and a key, over all layers; read: tokens of K and V that are read, over all layers; draws:
        rows of logits."""
        config, rates = self.config, self.rates
        kv_bytes = kv_block(config, self.kv_dtype, 1).bytes_per_token // config.num_layers
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        inner = config.intermediate_size * max(config.experts_per_token, 1)
        values = config.num_layers * (2 * config.hidden_size + q + 2 * kv + inner)
        return StepTime(
            tokens=tokens,
            linears=linears,
            attention=rates.attention(self.kv_dtype, 4.0 * pairs * q, float(read * kv_bytes), decode),
            elementwise=rates.elementwise(float(tokens * values)),
            sampling=rates.sampling(float(draws * config.vocab_size)),
            overhead=overhead,
        )

    def _read_bytes(self, shape: LinearShape) -> int:
        """What a step reads of a weight. The rows that are kept beside a packed table are not read."""
        size = linear_bytes(shape, self.mode, self.backend, self.config.dtype)
        doubled = self.backend.keeps_table and shape.embedding and (self.mode == "none" or shape.kept)
        return size // 2 if doubled else size

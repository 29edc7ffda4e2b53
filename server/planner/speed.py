"""How fast a model should be: the parts of a step, from its sizes and the device's rates."""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig
from server.planner.rates import Rates
from server.planner.sizes import Backend, kv_block, linear_bytes, linear_shapes


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
        seen = [min(context, window or context) for window in self._windows()]
        return self._step(sequences, sequences, sum(seen) * sequences, sum(seen) * sequences, sequences, decode=True)

    def prefill(self, prompt: int, max_tokens_per_step: int) -> StepTime:
        """A prompt of so many tokens, alone, in as many steps as it takes; the last one draws the first token."""
        parts = [
            self._prefill_step(start, min(max_tokens_per_step, prompt - start), last=start + max_tokens_per_step >= prompt)
            for start in range(0, prompt, max_tokens_per_step)
        ]
        return StepTime(
            prompt,
            sum(part.linears for part in parts),
            sum(part.attention for part in parts),
            sum(part.elementwise for part in parts),
            sum(part.sampling for part in parts),
            sum(part.overhead for part in parts),
        )

    def _prefill_step(self, start: int, tokens: int, last: bool) -> StepTime:
        pairs = read = 0
        for window in self._windows():
            # Token i sees i + 1 tokens, or as many as the window holds.
            full = window or start + tokens
            growing = max(min(full - start, tokens), 0)
            pairs += growing * start + growing * (growing + 1) // 2 + (tokens - growing) * full
            read += min(start + tokens, full + tokens)
        return self._step(tokens, 1, pairs, read, 1 if last else 0, decode=False)

    def _windows(self) -> list[int | None]:
        return [self.config.layer_window(layer) for layer in range(self.config.num_layers)]

    def _step(self, tokens: int, sequences: int, pairs: int, read: int, draws: int, decode: bool) -> StepTime:
        """tokens: rows of the layers; pairs: of a query and a key, over all layers; read: tokens of K and V that are
        read, over all layers; draws: rows of the head."""
        config, rates, mode = self.config, self.rates, self.mode
        shapes = [shape for shape in linear_shapes(config) if shape.role != "table"]
        sizes = {shape.name: self._bytes(shape.name) for shape in shapes}
        model_bytes = sum(sizes.values())
        linears = 0.0
        for shape in shapes:
            rows = draws if shape.role == "head" else tokens
            if rows:
                linears += rates.linear(mode, shape.num_weights, sizes[shape.name], model_bytes, rows)
        kv_bytes = kv_block(config, self.kv_dtype, 1).bytes_per_token // config.num_layers
        operations = 4.0 * pairs * config.num_heads * config.head_dim
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        values = config.num_layers * (2 * config.hidden_size + q + 2 * kv + config.intermediate_size)
        return StepTime(
            tokens=tokens,
            linears=linears,
            attention=rates.attention(self.kv_dtype, operations, float(read * kv_bytes), decode),
            elementwise=rates.elementwise(float(tokens * values)),
            sampling=rates.sampling(float(draws * config.vocab_size)),
            overhead=rates.overhead(config.num_layers, sequences),
        )

    def _bytes(self, name: str) -> int:
        """What a step reads of a weight. A table kept beside a packed head is not read."""
        for shape in linear_shapes(self.config):
            if shape.name == name:
                size = linear_bytes(shape, self.mode, self.backend, self.config.dtype)
                doubled = self.backend.name == "portable" and shape.embedding
                return size // 2 if doubled else size
        raise KeyError(name)

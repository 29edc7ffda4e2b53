"""What a precision costs: the same text through a model and through itself unquantized, side by side.

Both run on one Ops, through paged KV caches, as the engine runs them; so what is measured is what is served. The
numbers are those of `models.receipt.Receipt`. Both models are in memory at the same time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.ops import Activations, AttentionMetadata, KVCache, Ops
from models.decoder import Decoder
from models.errors import ModelError
from models.layers import DecoderModel

BLOCK_SIZE = 64  # a size that every backend takes
STEP_TOKENS = 1024  # tokens of all sequences in one step, unless one sequence is longer
WINDOW_TOKENS = 1024  # a text is read in windows of this length, or of the model's context if that is shorter
_LOGITS = 2**22  # of both models, in float64, at a time: 32 MiB each

# Which held-out documents and tasks of the embedded model: those of its model card.
CORPUS_SEED = 1
HELDOUT_DOCUMENTS = 400

# progress(what is being done, share of it that is done)
Progress = Callable[[str, float], None]


def silent(what: str, share: float) -> None:
    """Tell nobody."""


# What is read


@dataclass(frozen=True, slots=True)
class Text:
    """Token sequences to predict, each from its first token on, and what they are made of.

    source: for a person, no path. sha256: hexadecimal, of the text's UTF-8 bytes.
    """

    source: str
    sha256: str
    rows: list[list[int]]


def text_of_file(file: Path, folder: Path, bos_token_id: int | None, context: int, max_tokens: int) -> Text:
    """The first `max_tokens` tokens of a text file, by the tokenizer of the model in `folder`, in windows that do not
    overlap. Each begins with the model's begin token where its tokenizer puts one in front of a text.

    context: what a sequence may have at most. Raises ModelError.
    """
    try:
        data = file.read_bytes()
        content = data.decode("utf-8")
    except OSError as error:
        raise ModelError(f"the text {file} cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise ModelError(f"the text {file} is not UTF-8; convert it first") from None
    tokenizer = load_tokenizer(folder)
    ids: list[int] = tokenizer.encode(content, add_special_tokens=False).ids[:max_tokens]
    begin = [bos_token_id] if bos_token_id in tokenizer.encode("", add_special_tokens=True).ids else []
    window = min(WINDOW_TOKENS, context) - len(begin)
    if len(ids) + len(begin) < 2 or window + len(begin) < 2:
        raise ModelError(f"the text {file} has {len(ids)} tokens, too few to predict any; give a longer text")
    rows = [begin + ids[start : start + window] for start in range(0, len(ids), window)]
    return Text(file.name, hashlib.sha256(data).hexdigest(), [row for row in rows if len(row) > 1])


def heldout_text(folder: Path, max_tokens: int) -> Text:
    """Documents of the embedded model's held-out split, by its tokenizer in `folder`: HELDOUT_DOCUMENTS, or the first
    of them that have no more than `max_tokens` tokens. Raises ModelError.
    """
    from models.training.corpus import documents
    from models.training.data import encode

    tokenizer = load_tokenizer(folder)
    digest, rows, tokens = hashlib.sha256(), list[list[int]](), 0
    for document in documents(CORPUS_SEED, "heldout", HELDOUT_DOCUMENTS):
        row = encode(tokenizer, document.pieces)[0]
        tokens += len(row)
        if rows and tokens > max_tokens:
            break
        digest.update(document.text.encode())
        rows.append(row)
    return Text("held-out documents of stet-tales", digest.hexdigest(), rows)


@dataclass(frozen=True, slots=True)
class Answer:
    """A task spelled out: the ids of prompt and right answer, the answer's from `begin` on."""

    ids: list[int]
    begin: int


def heldout_answers(folder: Path, count: int) -> dict[str, list[Answer]]:
    """The embedded model's tasks with one right answer, by kind: `count` each with no, one and three examples."""
    from models.training.corpus import heldout_tasks
    from models.training.evaluate import spelled_out
    from models.training.tasks import EXACT, SHOTS

    tokenizer = load_tokenizer(folder)
    return {
        name: [
            Answer(*spelled)
            for shots in SHOTS
            for spelled in spelled_out(tokenizer, heldout_tasks(CORPUS_SEED, name, shots, count))
        ]
        for name in EXACT
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a model, without padding and truncation. Raises ModelError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json, which a text needs; download the model again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file} cannot be used ({' '.join(str(error).split())[:200]}); download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# What reads it


def keep_unquantized(model: DecoderModel, base: DecoderModel, keep: str) -> None:
    """Give `model` the unquantized ends of `base`: the "table" of token vectors, the "head", or "both".

    To measure what their quantization costs: with tied embeddings the model then has both forms of the one weight.
    Both models must have been made with the same ops. Raises ModelError for a model that has no such parts.
    """
    if not isinstance(model, Decoder) or not isinstance(base, Decoder):
        raise ModelError(f"of {model.config.architecture} the token table and the head are not known here")
    if keep in ("table", "both"):
        model.table = base.table
    if keep in ("head", "both"):
        model.head = base.head


class ObservedOps:
    """An Ops that shows what passes through it: `observe` is called with each sum that `add`, `add_rms_norm` or
    `add_layer_norm` makes, [T, H], which is the residual stream. So no model needs hooks. Everything else is the inner
    Ops' own."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.observe: Callable[[Tensor], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """As the inner Ops does it."""
        normalized, total = self._ops.add_rms_norm(x, residual, weight, eps, quantize)
        self._show(total)
        return normalized, total

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """As the inner Ops does it."""
        normalized, total = self._ops.add_layer_norm(x, residual, weight, bias, eps, quantize)
        self._show(total)
        return normalized, total

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """As the inner Ops does it."""
        total = self._ops.add(x, residual)
        self._show(total)
        return total

    def _show(self, total: Tensor) -> None:
        if self.observe is not None:
            self.observe(total)

    def as_ops(self) -> Ops:
        """Itself. Only by its attributes can a type checker not see that it has all of an Ops."""
        return cast(Ops, self)


class Reader:
    """A model with KV caches of its own, that reads whole sequences, several in one step.

    Owns the caches, which grow to the largest step so far. Nothing is kept from one step to the next.
    """

    def __init__(self, model: DecoderModel, ops: ObservedOps, kv_dtype: torch.dtype) -> None:
        self.model, self.ops = model, ops
        self._specs = model.kv_cache_specs(BLOCK_SIZE, kv_dtype)
        self._caches: list[KVCache] = []

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Sequence[int]], observe: Callable[[Tensor], None] | None = None) -> Tensor:
        """The hidden states after the last norm of all tokens of `rows`, [T, H]: a tensor of the caller's own.

        `observe` is called with the residual stream [T, H] after each layer, in their order.
        """
        tables: list[range] = []
        for row in rows:
            first = tables[-1].stop if tables else 0
            tables.append(range(first, first - (-len(row) // BLOCK_SIZE)))
        blocks = tables[-1].stop
        ops = self.ops.as_ops()
        if not self._caches or self._caches[0].num_blocks < blocks:
            self._caches = [ops.allocate_kv_cache(spec, blocks) for spec in self._specs]
        lengths = [len(row) for row in rows]
        plan = ops.plan(AttentionMetadata(lengths, lengths, tables, BLOCK_SIZE))
        token_ids = torch.tensor([token for row in rows for token in row], device=ops.device)
        sums = 0

        def observe_layer(total: Tensor) -> None:
            nonlocal sums
            sums += 1
            if observe is not None and sums % 2 == 0:  # a layer adds its attention, then its MLP
                observe(total)

        self.ops.observe = observe_layer
        try:
            result = self.model.forward(token_ids, self._caches, plan).clone()
        finally:
            self.ops.observe = None
        if sums != 2 * len(self._specs):
            raise RuntimeError(f"{len(self._specs)} layers made {sums} sums; two a layer are understood here")
        return result

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> natural logarithms of the probabilities of the next token, float64 [R, V].

        Raises ModelError where they are not finite: no number about such a model means anything.
        """
        with torch.inference_mode():
            logits = self.model.logits(hidden).to(torch.float64)
            if not bool(torch.isfinite(logits).all()):
                raise ModelError("the model's logits are not finite, so there is nothing to measure; check its weights")
            return logits.log_softmax(-1)

    def most_likely(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> the most likely next token of each row, int64 [R]."""
        return self.log_probabilities(hidden).argmax(-1)


def steps(rows: Sequence[Sequence[int]]) -> Iterator[range]:
    """Cut the rows, in their order, into steps of STEP_TOKENS tokens at most (or of one row that is longer)."""
    start = tokens = 0
    for index, row in enumerate(rows):
        if index > start and tokens + len(row) > STEP_TOKENS:
            yield range(start, index)
            start, tokens = index, 0
        tokens += len(row)
    if start < len(rows):
        yield range(start, len(rows))


def _pieces(rows: Tensor, vocab_size: int) -> Iterator[slice]:
    """Slices of rows [R, ...] whose logits are few enough to be held at once."""
    size = max(1, _LOGITS // vocab_size)
    return (slice(start, start + size) for start in range(0, len(rows), size))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on one text. The fields are those of `models.receipt.Receipt`; tokens: how many were predicted."""

    tokens: int
    perplexity_unquantized: float
    perplexity: float
    mean_kl: float
    top1_agreement: float
    layer_errors: tuple[float, ...]


def compare(base: Reader, other: Reader, rows: Sequence[Sequence[int]], progress: Progress = silent) -> Comparison:
    """Predict every token of `rows` but their first ones with both models. They must share a vocabulary.

    Raises ValueError if there is no token to predict, ModelError for logits that are not finite.
    """
    num_layers, vocab = base.model.config.num_layers, base.model.config.vocab_size
    device = base.ops.as_ops().device
    nats, other_nats, divergence = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    errors = torch.zeros(num_layers, dtype=torch.float64, device=device)
    agreed = predicted = read = 0
    total = sum(map(len, rows))
    for step in steps(rows):
        some = [rows[index] for index in step]
        streams: list[Tensor] = []

        def keep(stream: Tensor, streams: list[Tensor] = streams) -> None:
            streams.append(stream.clone())

        hidden = base.hidden(some, keep)
        if other is base:
            other_hidden = hidden
        else:
            layers = iter(range(num_layers))

            def add_error(stream: Tensor, layers: Iterator[int] = layers, streams: list[Tensor] = streams) -> None:
                layer = next(layers)
                before = streams[layer].to(torch.float64)
                norms = before.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
                errors[layer] += ((stream.to(torch.float64) - before).norm(dim=-1) / norms).sum()

            other_hidden = other.hidden(some, add_error)
        ids = torch.tensor([token for row in some for token in row], device=device)
        ends = torch.tensor([len(row) for row in some], device=device).cumsum(0) - 1
        places = torch.ones(len(ids), dtype=torch.bool, device=device)
        places[ends] = False  # nothing follows there
        (at,) = places.nonzero(as_tuple=True)
        for piece in _pieces(at, vocab):
            where = at[piece]
            p = base.log_probabilities(hidden[where])
            q = p if other is base else other.log_probabilities(other_hidden[where])
            following = ids[where + 1, None]
            nats -= p.gather(1, following).sum()
            other_nats -= q.gather(1, following).sum()
            divergence += (p.exp() * (p - q)).sum()
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        predicted += len(at)
        read += len(ids)
        progress("reading the text", read / total)
    if not predicted:
        raise ValueError("rows hold no token to predict; give at least one of two tokens")
    return Comparison(
        tokens=predicted,
        perplexity_unquantized=_perplexity(float(nats) / predicted),
        perplexity=_perplexity(float(other_nats) / predicted),
        mean_kl=float(divergence) / predicted,
        top1_agreement=agreed / predicted,
        layer_errors=tuple((errors / read).tolist()),
    )


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        raise ModelError(
            f"the model needs {nats:.0f} nats a token, which is no model of this text; check its weights"
        ) from None


def exact_match(reader: Reader, answers: Sequence[Answer], progress: Progress = silent) -> float:
    """Share of the answers that greedy decoding spells to the letter and ends where it should.

    It does so exactly if, reading prompt and right answer, the most likely next token is the answer's at each of its
    places; so one forward pass decides it. Raises ValueError if there are no answers.
    """
    if not answers:
        raise ValueError("answers is empty; there must be at least one")
    right = 0
    rows = [answer.ids for answer in answers]
    vocab = reader.model.config.vocab_size
    for step in steps(rows):
        hidden = reader.hidden([rows[index] for index in step])
        offset = 0
        for index in step:
            begin, ids = answers[index].begin, rows[index]
            states = hidden[offset + begin - 1 : offset + len(ids) - 1]
            drawn = torch.cat([reader.most_likely(states[piece]) for piece in _pieces(states, vocab)])
            right += drawn.tolist() == ids[begin:]
            offset += len(ids)
        progress("solving the tasks", step.stop / len(rows))
    return right / len(answers)

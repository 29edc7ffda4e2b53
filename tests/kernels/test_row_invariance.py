"""A row has the same bits whatever other rows are in the call, and a token's K and V however they came about."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.ops import AttentionMetadata, QuantizationMode
from kernels.portable import PortableOps, attention, linear
from kernels.portable.workspace import Workspace
from tests.kernels.cases import DTYPES, Layer, attention_step, block_table, poison, random_sampling, stored

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 17, 31, 33, 64, 65, 97, 128, 130, 300]


def assert_rows_stand(op: Callable[[Tensor], Tensor], x: Tensor, rows: list[int] = ROWS) -> None:
    """op of the first, the last and some middle rows gives the bits that op of all rows gives there."""
    whole = op(x).clone()
    for count in rows:
        for start in {0, len(x) - count, (len(x) - count) // 2}:
            part = op(x[start : start + count])
            assert torch.equal(part, whole[start : start + count]), f"{count} rows from {start}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(1280, 768), (768, 2048), (96, 80), (33, 50), (7, 33), (251, 11008), (4096, 1024), (130, 4099)],
)
def test_linear(dtype: torch.dtype, out_features: int, in_features: int) -> None:
    ops = PortableOps(dtype=dtype)
    weight = ops.prepare_linear(torch.randn(out_features, in_features) / in_features**0.5, torch.randn(out_features))
    assert_rows_stand(lambda x: ops.linear(x, weight), torch.randn(300, in_features).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
@pytest.mark.parametrize(("out_features", "in_features"), [(768, 512), (33, 50), (7, 33), (130, 4099)])
def test_int8_linear(dtype: torch.dtype, mode: QuantizationMode, out_features: int, in_features: int) -> None:
    ops = PortableOps(dtype=dtype)
    weight = ops.prepare_linear(torch.randn(out_features, in_features), torch.randn(out_features), mode)
    assert_rows_stand(lambda x: ops.linear(x, weight), torch.randn(130, in_features).to(dtype), ROWS[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_long_prompt(dtype: torch.dtype) -> None:
    ops = PortableOps(dtype=dtype)
    weight = ops.prepare_linear(torch.randn(768, 768) / 28)
    assert_rows_stand(lambda x: ops.linear(x, weight), torch.randn(2048, 768).to(dtype), [1, 16, 511, 512, 1024])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["none", "w8a16"])
def test_linear_one_by_one(dtype: torch.dtype, mode: QuantizationMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback where the start-up check finds that rows depend on their number, with a library in which they do."""
    call = linear._call

    def depends_on_the_rows(x: Tensor, *weight: Tensor | None) -> Tensor:
        y = call(x, *weight)
        return y * (1 + 0.01 * (len(x) + torch.arange(len(x))))[:, None].to(y.dtype)

    monkeypatch.setattr(linear, "_call", depends_on_the_rows)
    ops = PortableOps(dtype=dtype)
    weight = ops.prepare_linear(torch.randn(60, 300), None, mode)
    assert ops.fallbacks["linear"] == 1
    assert_rows_stand(lambda x: ops.linear(x, weight), torch.randn(100, 300).to(dtype), [1, 7, 16, 33])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 768, 1000, 4096])
def test_norms(dtype: torch.dtype, width: int) -> None:
    ops = PortableOps(dtype=dtype)
    weight = torch.randn(width).to(dtype)
    x, residual = (torch.randn(300, width).to(dtype) for _ in range(2))
    assert_rows_stand(lambda x: ops.rms_norm(x, weight, 1e-6), x)
    both = torch.cat([x, residual], 1)
    assert_rows_stand(lambda b: ops.add_rms_norm(b[:, :width], b[:, width:], weight, 1e-6)[0], both)


# Runs in a process of its own, since the number of threads belongs to the process. Prints how many sizes changed the
# bits of a stock activation (the planted failure), and fails if one of ours did.
_EVERY_THREAD_COUNT = """
import torch
from torch.nn import functional as F
from kernels.portable import PortableOps
from kernels.portable.elementwise import exp_, tanh_

torch.manual_seed(0)
naive = 0
for threads in (1, 2, 3, 4, 7):
    for dtype in (torch.float32, torch.bfloat16):
        ops = PortableOps(threads=threads, dtype=dtype)
        for width in (37, 250, 2048):
            x = (torch.randn(211, 2 * width) * 4).to(dtype)
            weight = torch.randn(2 * width).to(dtype)
            if threads == 1:
                single = ops.silu_mul(x[:1])
            silu, gelu, norm = ops.silu_mul(x), ops.gelu_mul(x), ops.rms_norm(x, weight, 1e-6)
            others = {
                "exact gelu": lambda x: ops.gelu(x, False),
                "gelu": lambda x: ops.gelu(x, True),
                "softcap": lambda x: ops.softcap(x, 5.0),
                "layer norm": lambda x: ops.layer_norm(x, weight, weight, 1e-6),
            }
            whole = {name: compute(x) for name, compute in others.items()}
            stock = F.silu(x[:, :width]) * x[:, width:]
            flat = x.float()
            exps, tanhs = exp_(flat.clone()), tanh_(flat.clone())
            for rows in (1, 2, 3, 5, 13, 16, 17, 31, 100, 210):
                assert torch.equal(ops.silu_mul(x[:rows]), silu[:rows]), (threads, dtype, width, rows)
                assert torch.equal(ops.gelu_mul(x[:rows]), gelu[:rows]), (threads, dtype, width, rows)
                assert torch.equal(ops.rms_norm(x[:rows], weight, 1e-6), norm[:rows]), (threads, dtype, width, rows)
                for name, compute in others.items():
                    assert torch.equal(compute(x[:rows]), whole[name][:rows]), (name, threads, dtype, width, rows)
                assert torch.equal(exp_(flat[:rows].clone()), exps[:rows]), (threads, width, rows)
                assert torch.equal(tanh_(flat[:rows].clone()), tanhs[:rows]), (threads, width, rows)
                naive += not torch.equal(F.silu(x[:rows, :width]) * x[:rows, width:], stock[:rows])
print(naive)
"""


def test_activations_at_every_thread_count() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _EVERY_THREAD_COUNT], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0, "the stock activation never changed its bits: this test sees nothing"


LAYERS = [
    Layer(12, 4, 64),
    Layer(4, 4, 80, block_size=32),
    Layer(8, 1, 96, window=100),
    Layer(2, 1, 128),
    Layer(3, 1, 256, window=40, softcap=30.0),
]


class History:
    """Runs one sequence in given chunks among strangers, and keeps what each of its tokens got."""

    def __init__(self, layer: Layer, kv_dtype: torch.dtype, length: int) -> None:
        dtype = torch.float32 if kv_dtype == torch.int8 else kv_dtype
        self.layer, self.dtype, self.kv_dtype, self.length = layer, dtype, kv_dtype, length
        self.packed = layer.packed(length, dtype, seed=1)
        self.rotary = layer.rotary(1024)
        self.ops = PortableOps(dtype=dtype)

    def run(
        self, chunks: list[int], strangers: int, seed: int, poisoned: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (rotated queries, stored keys and values, attention outputs) of the sequence's tokens, in order."""
        rng = random.Random(seed)
        layer, size = self.layer, self.layer.block_size
        num_blocks = 64 + 40 * strangers
        cache = self.ops.allocate_kv_cache(layer.spec(self.kv_dtype), num_blocks)
        if poisoned:
            poison(cache)
        free = rng.sample(range(num_blocks), num_blocks)
        own_table = block_table(self.length, size, free)
        tables = [block_table(600, size, free) for _ in range(strangers)]
        others = [0] * strangers
        done, results = 0, []
        for chunk in chunks:
            sequences = [(chunk, done + chunk, own_table, self.packed[done : done + chunk])]
            for i in range(strangers):
                new = rng.choice([1] * 12 + [2, 37, 140]) if others[i] else rng.choice([1, 5, 130])
                if others[i] + new > 600:
                    others[i], new = 0, 1
                others[i] += new
                stranger = layer.packed(new, self.dtype, seed=rng.randrange(1 << 30))
                sequences.append((new, others[i], tables[i], stranger))
            place = rng.randrange(len(sequences))
            sequences[0], sequences[place] = sequences[place], sequences[0]
            first = sum(s[0] for s in sequences[:place])
            lens, seq_lens, block_tables, packed = zip(*sequences, strict=True)
            metadata = AttentionMetadata(lens, seq_lens, block_tables, size)
            query, output, plan = attention_step(self.ops, layer, cache, metadata, torch.cat(list(packed)), self.rotary)
            own = slice(first, first + chunk)
            results.append((query[own].clone(), stored(cache, plan)[:, own].clone(), output[own].clone()))
            done += chunk
        queries, keys_values, outputs = zip(*results, strict=True)
        return torch.cat(queries), torch.cat(keys_values, 1), torch.cat(outputs)


def chunks_of(length: int, rng: random.Random, sizes: list[int]) -> list[int]:
    """Cut a length into chunks of these sizes at random."""
    chunks: list[int] = []
    while sum(chunks) < length:
        chunks.append(min(rng.choice(sizes), length - sum(chunks)))
    return chunks


@pytest.mark.parametrize("kv_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.usefixtures("one_thread")  # two threads: in the long sequence below
def test_attention_alone_batched_chunked_and_token_by_token(kv_dtype: torch.dtype, layer: Layer) -> None:
    history = History(layer, kv_dtype, length=290)
    rng = random.Random(0)
    expected = history.run([290], strangers=0, seed=0)
    runs = {
        "whole among others": history.run([290], strangers=3, seed=1, poisoned=True),
        "chunks alone": history.run(chunks_of(290, rng, [1, 3, 50]), strangers=0, seed=2),
        "chunks among others": history.run(chunks_of(290, rng, [1, 16, 17, 100]), strangers=2, seed=3, poisoned=True),
        "prompt, then decode": history.run([120] + [1] * 170, strangers=1, seed=4),
    }
    for name, actual in runs.items():
        for part, got, want in zip(("query", "keys and values", "output"), actual, expected, strict=True):
            assert torch.equal(got, want), f"{name}: {part}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_long_sequence(dtype: torch.dtype) -> None:
    history = History(Layer(6, 2, 64), dtype, length=900)
    expected = history.run([900], strangers=0, seed=0)
    for chunks in ([512, 388], [128] * 7 + [4], [890] + [1] * 10):
        for got, want in zip(history.run(chunks, strangers=1, seed=5), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_a_tile_for_every_token(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback where the start-up check finds that tile heights differ."""
    monkeypatch.setattr(attention, "heights_agree", lambda *args: False)
    history = History(Layer(6, 2, 64), dtype, length=140)
    expected = history.run([140], strangers=0, seed=0)
    actual = history.run([60, 40] + [1] * 40, strangers=2, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_start_up_checks_see_a_dependence_on_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose last bit depends on the number of rows sends both checks to their fallbacks."""
    attend, call = attention.attend, linear._call
    assert attention.heights_agree(64, torch.float32, 4, softcap=False)
    workspace = Workspace()
    packed, rows = (
        linear.prepare(torch.randn(8, 16), None, mode, torch.float32, packed=mode == "none", table=False)
        for mode in ("none", "w8a16")
    )
    assert linear.rows_agree(packed, workspace)
    assert linear.rows_agree(rows, workspace)
    monkeypatch.setattr(attention, "attend", lambda q, *args: attend(q, *args) * (1 + 1e-6 * (q.shape[2] == 4)))
    monkeypatch.setattr(linear, "_call", lambda x, *weight: call(x, *weight) * (1 + 1e-6 * (len(x) == 33)))
    assert not attention.heights_agree(64, torch.float32, 4, softcap=False)
    assert not linear.rows_agree(packed, workspace)
    assert not linear.rows_agree(rows, workspace)


def test_stock_attention_would_fail() -> None:
    """The planted failure: with torch's own choice of shapes, decode and prefill differ."""
    q, k, v = (torch.randn(1, 4, 290, 64) for _ in range(3))
    prefill = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    decode = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v)
    assert not torch.equal(prefill[:, :, -1:], decode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_behind_the_window_may_be_gone(dtype: torch.dtype) -> None:
    """Blocks that lie wholly before a sliding window may belong to a dead request."""
    layer = Layer(4, 2, 64, window=40)
    ops, rotary = PortableOps(dtype=dtype), layer.rotary(256)
    cache = ops.allocate_kv_cache(layer.spec(dtype), 16)
    packed = layer.packed(220, dtype, seed=0)
    table = list(range(14))
    outputs = []
    for poisoned in (False, True):
        attention_step(ops, layer, cache, AttentionMetadata([199], [199], [table], 16), packed[:199], rotary)
        if poisoned:
            cache.data[:, : (199 - 40 + 1) // 16] = float("nan")
        rest = attention_step(ops, layer, cache, AttentionMetadata([21], [220], [table], 16), packed[199:], rotary)
        outputs.append(rest[1])
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("kv_dtype", [*DTYPES, torch.int8])
def test_a_dead_sequence_touches_no_other(kv_dtype: torch.dtype) -> None:
    """A NaN request in the same step, and then its freed, partly filled blocks in a new owner's hands."""
    layer, dtype = Layer(6, 2, 64), torch.float32 if kv_dtype == torch.int8 else kv_dtype
    ops, rotary = PortableOps(dtype=dtype), layer.rotary(64)
    cache = ops.allocate_kv_cache(layer.spec(kv_dtype), 8)
    packed = layer.packed(10, dtype, seed=0)
    clean = attention_step(ops, layer, cache, AttentionMetadata([10], [10], [[1]], 16), packed, rotary)[1]
    both = torch.cat([torch.full_like(packed, float("nan")), packed])
    metadata = AttentionMetadata([10, 10], [10, 10], [[3], [1]], 16)
    output = attention_step(ops, layer, cache, metadata, both, rotary)[1]
    assert output[:10].isnan().all()
    assert torch.equal(output[10:], clean)
    reused = AttentionMetadata([3, 7], [3, 7], [[3], [5]], 16)
    output = attention_step(ops, layer, cache, reused, packed, rotary)[1]
    assert torch.equal(output[:3], clean[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_rows_may_hold_anything(dtype: torch.dtype) -> None:
    """A decode tile's padding rows keep what earlier calls left there, NaN of a dead request included."""
    full, padded = Layer(8, 2, 64), Layer(6, 2, 64)
    metadata = AttentionMetadata([1] * 4, [1] * 4, [[0], [1], [2], [3]], 16)
    packed, dead = padded.packed(4, dtype, seed=0), torch.full_like(full.packed(4, dtype, seed=0), float("nan"))
    outputs = []
    for others in (False, True):
        ops = PortableOps(dtype=dtype)
        cache = ops.allocate_kv_cache(full.spec(dtype), 4)
        if others:
            attention_step(ops, full, cache, metadata, dead, full.rotary(64))
        outputs.append(attention_step(ops, padded, cache, metadata, packed, padded.rotary(64))[1])
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_rows_are_independent(dtype: torch.dtype) -> None:
    """Each row drawn alone, and among others in another order, with a row of NaN beside it."""
    rng, ops = random.Random(0), PortableOps(dtype=dtype)
    for vocab in (50, 1000):
        logits = (torch.randn(12, vocab) * 3).to(dtype)
        metadata = random_sampling(rng, 12, vocab)
        together = ops.sample(logits, metadata).token_ids.tolist()
        logits_with_nan = logits.clone()
        logits_with_nan[4, 7] = float("nan")
        logits_with_nan[6, 1] = float("-inf")
        result = ops.sample(logits_with_nan, metadata)
        assert result.finite.tolist() == [row not in (4, 6) for row in range(12)]
        for row in range(12):
            if row not in (4, 6):
                assert result.token_ids[row] == together[row]
            assert ops.sample(logits[row : row + 1], one_row(metadata, row)).token_ids.tolist() == [together[row]]


def one_row(metadata: object, row: int) -> object:
    """The metadata of one row, as row 0."""
    fields = {}
    for name in metadata.__slots__:  # type: ignore[attr-defined]
        value = getattr(metadata, name)
        if name == "biases":
            fields[name] = [(0, token, bias) for r, token, bias in value if r == row]
        elif isinstance(value, dict):
            fields[name] = {0: value[row]} if row in value else {}
        else:
            fields[name] = [value[row]]
    return type(metadata)(**fields)

"""Training for int8: the student computes what will be served, learns from that, and its file holds those integers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.int8 import LARGEST, dequantize_rows, quantize_rows
from kernels.ops import QuantizationMode
from kernels.reference import ReferenceLinear, ReferenceOps
from models.hub import resolve_model
from models.layers import Linear
from models.llama import Llama
from models.loader import load_model
from models.training import __main__ as stages
from models.training import export, qat, tokenizer
from models.training.compare import MODES, Comparison, HeldOut, clipping, compare, measure, section
from models.training.corpus import documents
from models.training.data import encode, texts
from models.training.decoder import Decoder, Projection, Shape
from models.training.evaluate import nats
from models.training.fake_quantize import embedding, fake_quantize, fake_quantize_weight
from models.training.train import Mixture, Recipe, Stream, train
from tests.models.paged_greedy import greedy

TINY = Shape(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=96
)
QUICK = replace(qat.RECIPE, peak_lr=4e-3, minutes=None, tokens=24 * 512, batch_tokens=512, lengths=((1.0, 64),))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and waits for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return tokenizer.train(texts(1, 150), 512)


@pytest.fixture(scope="module")
def stream(small_tokenizer: Tokenizer) -> Stream:
    ids = [i for doc in documents(1, "train", 150) for i in encode(small_tokenizer, doc.pieces)[0]]
    return Stream(np.array(ids, np.uint16))


@pytest.fixture(scope="module")
def learned(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model that int8 hurts: trained a little, then given a unit that is never active, but whose weights are so large
    that int8 has few steps left for their neighbours. Unquantized it changes nothing."""
    torch.manual_seed(0)
    model = Decoder(TINY)
    recipe = Recipe(peak_lr=2e-2, tokens=30 * 512, batch_tokens=512, lengths=((1.0, 64),), compile=False, bf16=False)
    train(model, stream, recipe, tmp_path_factory.mktemp("learned") / "run.pt", lambda line: None)
    with torch.no_grad():
        for layer in model.layers:
            gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
            gate[5] = up[5] = 0
            # Of the 255 integers of a row, three are left for all the other weights.
            down[:, 5] = down.abs().amax(1) * LARGEST
    return model


def random_rows(seed: int) -> Tensor:
    """Rows of very different sizes, with a row of zeros and rows of one value."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, 96, generator=generator) * 10 ** (torch.rand(400, 1, generator=generator) * 60 - 30)
    rows[0] = 0
    rows[1] = 3.7
    rows[2, 1:] = 0
    return rows


def test_the_forward_pass_is_the_servers_rounding_to_the_bit() -> None:
    rows = random_rows(1)
    assert torch.equal(fake_quantize(rows), dequantize_rows(*quantize_rows(rows)))
    stored = rows.bfloat16()
    assert torch.equal(fake_quantize_weight(rows), dequantize_rows(*quantize_rows(stored)))
    ids = torch.randint(0, 400, (2, 7), generator=torch.Generator().manual_seed(2))
    ops = ReferenceOps()
    served = ops.embedding(ids.flatten(), ops.prepare_linear(stored, mode="w8a8", embedding=True))
    assert torch.equal(embedding(ids, rows, "w8a8").flatten(0, 1), served)


@pytest.mark.parametrize("rounding", [fake_quantize, fake_quantize_weight])
def test_the_gradient_passes_straight_through(rounding: type) -> None:
    rows = random_rows(3).requires_grad_()
    wanted = torch.randn(rows.shape, generator=torch.Generator().manual_seed(4))
    (rounding(rows) * wanted).sum().backward()  # type: ignore[attr-defined]
    assert torch.equal(rows.grad, wanted)


def test_nothing_is_clipped() -> None:
    """So there is no place where the gradient would have to be zero: no finite value is rounded beyond the range."""
    rows = random_rows(5)
    largest = rows.abs().amax(-1, keepdim=True)
    beyond = torch.round(rows[1:] * (torch.full_like(largest, LARGEST) / largest)[1:]).abs()
    assert int(beyond.max()) == LARGEST


def test_the_student_computes_what_is_served() -> None:
    """The embedded model through a paged cache and the decoder of the training are the same but for the order of sums.

    In w8a8 that order now and then moves a value across the edge of a rounding, which later tokens read on; so there
    the text is the beginnings of many, and most of them have no such value.
    """
    folder = resolve_model("stet-tales")
    student, ops = export.load(folder), ReferenceOps()
    story = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Once upon a time there was a fox named Zoé.").ids
    )
    beginnings = [[token] for token in range(300, 364)]
    cases: list[tuple[QuantizationMode, list[list[int]]]] = [("w8a16", [story]), ("w8a8", beginnings)]
    for mode, prompts in cases:
        found = greedy(load_model(folder, ops, quantization=mode), ops, prompts, 1)
        served = torch.stack([logits for _, logits in found])
        with torch.inference_mode():
            plain = student.as_served("none").logits(torch.tensor(prompts))
            ours = student.as_served(mode).logits(torch.tensor(prompts))
        assert (ours - served).abs().amax(-1).median() < 1e-4
        assert (plain - served).abs().amax(-1).median() > 1e-2


def test_training_for_int8_pays_in_int8(learned: Decoder, stream: Stream, tmp_path: Path) -> None:
    """Two students of one teacher on the same batches; only one computes as it will be served."""
    inputs, targets = stream.batch(20_000, 16, 64, CPU)

    def served(model: Decoder) -> float:
        with torch.inference_mode():
            return export.rounded(deepcopy(model)).as_served("w8a8").loss(inputs, targets).item()

    before = served(learned)
    students = {mode: qat.run(learned, stream, QUICK, mode, tmp_path, lambda line: None) for mode in ("none", "w8a8")}
    assert before > learned.loss(inputs, targets).item() + 0.02, "the outliers cost nothing"
    assert served(students["w8a8"]) < served(students["none"]) - 0.01
    assert served(students["w8a8"]) < before
    assert all(weight.dtype == torch.float32 for weight in students["w8a8"].parameters())


def test_the_stage_resumes_to_the_bit(learned: Decoder, stream: Stream, tmp_path: Path) -> None:
    recipe = replace(QUICK, tokens=6 * 512)
    lines: list[str] = []
    whole = qat.run(learned, stream, recipe, "w8a8", tmp_path / "whole", lines.append)
    qat.run(learned, stream, recipe, "w8a8", tmp_path / "parts", lines.append, stop_after=2)
    assert not any("resumed" in line for line in lines)
    parts = qat.run(learned, stream, recipe, "w8a8", tmp_path / "parts", lines.append)
    assert any("resumed" in line for line in lines)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(whole.embed_tokens.weight, learned.embed_tokens.weight)


def test_the_distilled_part_is_the_divergence_from_the_teacher(learned: Decoder, stream: Stream) -> None:
    inputs, targets = stream.batch(0, 2, 64, CPU)
    with torch.no_grad():
        same = deepcopy(learned)
        assert qat.objective(same, learned, 1.0)(inputs, targets).item() == pytest.approx(0, abs=1e-6)
        assert qat.objective(same, learned, 0.0)(inputs, targets).item() == pytest.approx(
            learned.loss(inputs, targets).item(), rel=1e-6
        )
        same.norm.weight *= 0.5
        p, q = (model.logits(inputs).double().softmax(-1) for model in (learned, same))
        expected = (p * (p / q).log()).sum(-1).mean().item()
        assert qat.objective(same, learned, 1.0)(inputs, targets).item() == pytest.approx(expected, rel=1e-4)


def test_the_exported_file_holds_the_integers_of_the_training(
    learned: Decoder, stream: Stream, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    student = qat.run(learned, stream, replace(QUICK, tokens=3 * 512), "w8a8", tmp_path, lambda line: None)
    export.export(student, small_tokenizer, tmp_path / "out")
    served = load_model(tmp_path / "out", ReferenceOps(), quantization="w8a8")
    assert isinstance(served, Llama)

    def check(loaded: Linear, *trained: Projection | torch.nn.Embedding) -> None:
        assert isinstance(loaded.weight, ReferenceLinear)
        assert loaded.weight.scales is not None
        with torch.no_grad():
            expected = torch.cat([fake_quantize_weight(layer.weight) for layer in trained])
        assert torch.equal(dequantize_rows(loaded.weight.weight, loaded.weight.scales), expected)

    check(served.table, student.embed_tokens)
    assert served.head is served.table
    for loaded, layer in zip(served.layers, student.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        check(loaded.attention.qkv, attention.q_proj, attention.k_proj, attention.v_proj)
        check(loaded.attention.output, attention.o_proj)
        check(loaded.mlp.gate_up, mlp.gate_proj, mlp.up_proj)
        check(loaded.mlp.down, mlp.down_proj)


def test_a_mixture_takes_as_much_of_each_stream() -> None:
    first, second = Stream(np.arange(100, dtype=np.uint16)), Stream(np.arange(500, 600, dtype=np.uint16))
    mixture = Mixture((first, second))
    seen = torch.cat([mixture.batch(start, 4, 5, CPU)[0] for start in (0, 20)])
    assert sorted(seen[seen < 100].tolist()) == list(range(20))
    assert sorted(seen[seen >= 100].tolist()) == list(range(500, 520))
    with pytest.raises(ValueError, match="3 rows are not a multiple of 2 streams"):
        mixture.batch(0, 3, 5, CPU)


def test_the_comparison_pairs_every_row_with_the_first(
    learned: Decoder, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    worse = deepcopy(learned)
    with torch.no_grad():
        worse.norm.weight *= 0.8
    models = {"start": deepcopy(learned), "worse": worse}
    held_out = HeldOut.make(small_tokenizer, 1, 12, 1)
    found = compare({name: measure(model, small_tokenizer, held_out) for name, model in models.items()}, held_out)
    rows = {(row.weights, row.mode): row for row in found.rows}
    assert len(rows) == 2 * len(MODES)
    first, int8, other = rows["start", "none"], rows["start", "w8a8"], rows["worse", "none"]
    assert (first.excess, first.excess_error, first.kl, first.top1) == (0, 0, 0, 1)
    assert int8.kl > 1e-3
    assert int8.top1 < 1
    for name, row in (("start", first), ("worse", other)):
        ids = [encode(small_tokenizer, doc.pieces)[0] for doc in documents(1, "heldout", 12)]
        total, tokens = sum(nats(models[name], [one]).item() for one in ids), sum(len(one) - 1 for one in ids)
        assert tokens == found.tokens
        assert row.perplexity_all == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert other.excess == pytest.approx(np.log(other.perplexity_all / first.perplexity_all), rel=1e-4)
    assert 0 < other.excess_error < other.excess
    found.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == found
    table = section(found, {"start": "before"}).splitlines()
    assert len(table) == 2 + len(found.rows)
    assert {line.count("|") for line in table} == {9}
    assert table[2].startswith("| before | bf16 |")


def test_clipping_pays_where_one_value_is_far_from_the_rest() -> None:
    rows = torch.rand(6, 64, generator=torch.Generator().manual_seed(6)) - 0.5
    (whole, cut) = clipping([rows, torch.zeros(1, 64)], (1.0, 0.9))
    assert (whole.best, cut.best) == (7, 0)
    kept = dequantize_rows(*quantize_rows(rows))
    assert whole.error == pytest.approx(float((kept - rows).square().sum() / rows.square().sum()), rel=1e-5)
    assert cut.error > whole.error
    # With few values to clip and many to round, the steps of the many decide.
    rows = torch.cat([torch.rand(1, 100_000, generator=torch.Generator().manual_seed(7)), torch.full((1, 1), 1.1)], 1)
    (_, cut) = clipping([rows], (1.0, 0.95))
    assert cut.best == 1


def test_the_stage_begins_with_the_weights_there_are(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Without tuned weights: with the exported ones, which stay the start when others are exported over them."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    args = argparse.Namespace(out=out, scratch=scratch, layers=1, weights="tune")
    shape = replace(Shape(), vocab_size=small_tokenizer.get_vocab_size(), num_layers=1)
    first, second = export.rounded(Decoder(shape)), Decoder(shape)
    export.export(first, small_tokenizer, out)
    assert torch.equal(stages.before_qat(args).embed_tokens.weight, first.embed_tokens.weight)
    export.export(second, small_tokenizer, out)
    assert torch.equal(stages.before_qat(args).embed_tokens.weight, first.embed_tokens.weight)
    with pytest.raises(FileNotFoundError, match="run the stage `tune` first"):
        stages.chosen_weights(args)
    torch.save({"model": second.state_dict()}, qat.checkpoint(scratch, "w8a8"))
    args.weights = "qat"
    assert torch.equal(stages.chosen_weights(args).embed_tokens.weight, second.embed_tokens.weight)

"""What `stet evaluate` measures, against transformers and NumPy; its texts; and the receipt, from command to /info."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paged_greedy import greedy
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from kernels.reference import ReferenceOps
from loadtests.processes import running_server
from models import evaluate
from models.errors import ModelError
from models.evaluate import Answer, ObservedOps, Reader, compare, exact_match, heldout_answers, text_of_file
from models.loader import load_model, resolve_model, save_random_checkpoint
from models.receipt import Receipt, ReceiptMatch, ReceiptText, receipt_name, write_receipt
from server.cli import main

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}


def rows(lengths: list[int], vocab: int = 101) -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(vocab, size=length).tolist() for length in lengths]


@torch.inference_mode()
def oracle(folder: Path, texts: list[list[int]]) -> tuple[list[Any], list[Any]]:
    """What transformers computes: per text the logits [T, V], and the residual stream after each layer [L, T, H]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    streams: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, out: streams.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    logits, residuals = [], []
    for text in texts:
        streams.clear()
        logits.append(model(torch.tensor([text])).logits[0].double().numpy())
        residuals.append(np.stack([stream.reshape(len(text), -1).double().numpy() for stream in streams]))
    return logits, residuals


def test_all_numbers_against_transformers_and_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that differ by noise. Small steps and small pieces of logits, so that every border is met."""
    monkeypatch.setattr(evaluate, "STEP_TOKENS", 100)
    monkeypatch.setattr(evaluate, "_LOGITS", 101 * 7)
    folders = tmp_path / "base", tmp_path / "other"
    save_random_checkpoint(HF_CONFIG, folders[0], seed=3, std=0.3)
    shutil.copytree(folders[0], folders[1])
    tensors = load_file(folders[0] / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(noisy, folders[1] / "model.safetensors")
    texts = rows([1, 64, 2, 130, 33, 65, 40])

    ops = ObservedOps(ReferenceOps())
    readers = [Reader(load_model(folder, ops.as_ops()), ops, torch.float32) for folder in folders]
    got = compare(readers[0], readers[1], texts)

    (p_logits, p_streams), (q_logits, q_streams) = oracle(folders[0], texts), oracle(folders[1], texts)
    nats, divergences, agreed, errors = [[], []], [], [], []
    for text, pl, ql, ps, qs in zip(texts, p_logits, q_logits, p_streams, q_streams, strict=True):
        p, q = (logits - np.logaddexp.reduce(logits, -1)[:, None] for logits in (pl, ql))
        for place in range(len(text) - 1):
            nats[0].append(-p[place, text[place + 1]])
            nats[1].append(-q[place, text[place + 1]])
            divergences.append(float((np.exp(p[place]) * (p[place] - q[place])).sum()))
            agreed.append(p[place].argmax() == q[place].argmax())
        errors.append(np.linalg.norm(qs - ps, axis=-1) / np.linalg.norm(ps, axis=-1))
    assert got.tokens == len(agreed) == sum(map(len, texts)) - len(texts)
    assert got.perplexity_unquantized == pytest.approx(math.exp(np.mean(nats[0])), rel=1e-4)
    assert got.perplexity == pytest.approx(math.exp(np.mean(nats[1])), rel=1e-4)
    assert got.mean_kl == pytest.approx(np.mean(divergences), rel=1e-3)
    assert got.top1_agreement == np.mean(agreed)
    assert got.layer_errors == pytest.approx(np.concatenate(errors, axis=1).mean(1), rel=1e-3)
    # The oracle says something: the models differ, and the parts differ from each other.
    assert 0.02 < got.mean_kl < 1
    assert 0.3 < got.top1_agreement < 0.99
    assert 0.02 < got.layer_errors[0] < got.layer_errors[2]

    # A model against itself loses nothing; an int8 cache is measured too.
    same = compare(readers[0], readers[0], texts)
    assert (same.mean_kl, same.top1_agreement, same.layer_errors) == (0.0, 1.0, (0.0, 0.0, 0.0))
    assert same.perplexity == same.perplexity_unquantized == got.perplexity_unquantized
    cached = compare(readers[0], Reader(readers[0].model, ops, torch.int8), texts)
    assert 1e-6 < cached.mean_kl < got.mean_kl
    with pytest.raises(ValueError, match="no token to predict"):
        compare(readers[0], readers[0], [[5]])


def test_a_broken_model_is_not_measured(tmp_path: Path) -> None:
    save_random_checkpoint(HF_CONFIG, tmp_path, seed=3)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    ops = ObservedOps(ReferenceOps())
    reader = Reader(load_model(tmp_path, ops.as_ops()), ops, torch.float32)
    with pytest.raises(ModelError, match="not finite"):
        compare(reader, reader, rows([8]))


def test_exact_match_is_what_greedy_decoding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model's held-out tasks: one pass over prompt and answer decides as decoding token by token does."""
    monkeypatch.setattr(evaluate, "STEP_TOKENS", 300)
    folder = resolve_model("stet-tales")
    answers = [answer for name in ("translate", "sum") for answer in heldout_answers(folder, 3)[name]]
    ops = ObservedOps(ReferenceOps())
    model = load_model(folder, ops.as_ops())
    length = max(len(answer.ids) - answer.begin for answer in answers)
    decoded = greedy(model, ops.as_ops(), [answer.ids[: answer.begin] for answer in answers], length)
    right = [
        ids[: len(answer.ids) - answer.begin] == answer.ids[answer.begin :]
        for answer, (ids, _) in zip(answers, decoded, strict=True)
    ]
    assert 0 < sum(right) < len(right), "both cases must occur"
    reader = Reader(model, ops, torch.float32)
    assert exact_match(reader, answers) == sum(right) / len(right)
    solved = answers[right.index(True)]
    assert exact_match(reader, [solved]) == 1
    for place in (solved.begin, len(solved.ids) - 1):
        wrong = [*solved.ids]
        wrong[place] = 300
        assert exact_match(reader, [Answer(wrong, solved.begin)]) == 0


def test_the_text_of_a_file(tmp_path: Path) -> None:
    folder = resolve_model("stet-tales")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    content = "Once upon a time there was a café by the sea. " * 40
    file = tmp_path / "story.txt"
    file.write_text(content)
    text = text_of_file(file, folder, 1, context=100, max_tokens=350)
    assert [row[0] for row in text.rows] == [1] * 4
    assert [len(row) for row in text.rows] == [100, 100, 100, 350 - 3 * 99 + 1]
    ids = [token for row in text.rows for token in row[1:]]
    assert ids == tokenizer.encode(content, add_special_tokens=False).ids[:350]
    assert (text.source, text.sha256) == ("story.txt", hashlib.sha256(content.encode()).hexdigest())
    # Where a tokenizer puts nothing in front of a text, no begin token is made up.
    plain = text_of_file(file, folder, None, context=100, max_tokens=350)
    assert [token for row in plain.rows for token in row] == ids


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "is not UTF-8"), (b"", "has 0 tokens, too few"), (None, "cannot be read")],
)
def test_texts_that_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        text_of_file(file, resolve_model("stet-tales"), 1, context=100, max_tokens=100)


RECEIPT = Receipt(
    model="m",
    weights_hash="0" * 64,
    unquantized_weights_hash="0" * 64,
    quantization="w8a8",
    kv_cache_dtype="int8",
    dtype="float32",
    backend="cpu",
    device="cpu",
    instruction_set="avx2",
    versions={"stet": "1"},
    date="2026-11-24T00:00:00+00:00",
    text=ReceiptText("a.txt", "0" * 64, 1, 10),
    perplexity_unquantized=2.0,
    perplexity=2.01,
    mean_kl=0.001,
    top1_agreement=0.99,
    layer_errors=(0.01,),
    exact_match={"sum": ReceiptMatch(10, 0.5, 0.4)},
    weight_bytes_unquantized=20,
    weight_bytes=10,
)


def test_a_receipt_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_receipt(tmp_path, RECEIPT)
    assert file.name == receipt_name("w8a8", "int8") == "receipt-w8a8-kv-int8.json"
    assert receipt_name("w8a8", "bfloat16") == receipt_name("w8a8", "float32") == "receipt-w8a8.json"
    assert json.loads(file.read_text())["text"]["tokens"] == 10
    assert file.stat().st_mode & 0o777 == 0o644
    before = file.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ModelError, match="No space left on device"):
        write_receipt(tmp_path, RECEIPT)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
    with pytest.raises(ModelError, match="make the folder writable"):
        write_receipt(tmp_path / "nowhere", RECEIPT)


# The command


@functools.cache
def tales() -> Path:
    return resolve_model("stet-tales")


def copy_of_tales(folder: Path) -> Path:
    """A folder of our own, so that the repository's stays as it is."""
    return Path(shutil.copytree(tales(), folder / "my-tales", ignore=shutil.ignore_patterns("receipt*")))


def test_from_the_commands_to_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model smoothed, written as int8, measured on the backend that serves it, served and shown."""
    folder, calibration = tmp_path / "my-tales", tmp_path / "calibration.txt"
    calibration.write_text("Once upon a time there was a little fox named Pip who lost her kite in the garden. " * 20)
    threads = torch.get_num_threads()
    assert main(["quantize", "stet-tales", str(folder), "--smooth", str(calibration)]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (tales(), folder))
    norm = "model.layers.1.post_attention_layernorm.weight"
    mantissas = torch.frexp(before[norm].float() / after[norm].float()).mantissa
    assert torch.equal(mantissas, torch.full_like(mantissas, 0.5))
    assert not torch.equal(before[norm], after[norm])

    capsys.readouterr()
    command = ["evaluate", str(folder), "--device", "cpu"]
    assert main(command) == 2
    assert "my-tales is int8 already; say --against MODEL" in capsys.readouterr().err
    code = main([*command, "--against", "stet-tales", "--max-tokens", "1500", "--tasks", "1", "--json"])
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert code == 0, err
    receipt = json.loads(out)
    assert json.loads((folder / "receipt-w8a8.json").read_text()) == receipt
    assert "reading the text" in err
    assert str(tmp_path) not in out
    assert (receipt["model"], receipt["text"]["source"]) == ("my-tales", "held-out documents of stet-tales")
    assert receipt["weights_hash"] != receipt["unquantized_weights_hash"]
    assert 1000 < receipt["text"]["tokens"] < 1500
    assert receipt["perplexity"] < 1.01 * receipt["perplexity_unquantized"] < 3
    assert receipt["top1_agreement"] > 0.97
    assert 0 < receipt["mean_kl"] < 0.002
    assert len(receipt["layer_errors"]) == 4
    assert {name: match["tasks"] for name, match in receipt["exact_match"].items()} == dict.fromkeys(
        ("summary", "question", "mood", "translate", "sum"), 3
    )

    with running_server(["--device", "cpu", str(folder)], log=tmp_path / "log") as server:
        server.wait_ready(60)
        info = json.loads(server.get("/info")[1])
    assert info["identity"]["quantization"] == "w8a8"
    assert info["receipt"] == receipt


def test_refusals_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of_tales(tmp_path)
    for arguments, message in [
        ([str(folder)], "--text FILE is needed"),
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(folder), "--text", str(tmp_path / "nothing.txt")], "cannot be read"),
        (["--kv-cache-dtype", "int4"], "--kv-cache-dtype: 'int4' is not one of"),
    ]:
        assert main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("stet: ")
        assert error.count("\n") == 1
    for arguments in (["--max-tokens", "0"], ["--keep", "everything"]):
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *arguments])
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not list(folder.glob("*receipt*"))

"""Which receipt the engine shows: the one about what it serves, and no damaged one."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from models.receipt import Receipt, ReceiptMatch, ReceiptText, write_receipt
from server.engine.identity import Identity
from server.engine.receipts import MAX_BYTES, find_receipt

HASH = "ab" * 32
IDENTITY = Identity(
    model="m",
    architecture="LlamaForCausalLM",
    weights_hash=HASH,
    num_parameters=1,
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    quantization="w8a8",
    device="cpu",
    instruction_set="avx2",
    threads=1,
    versions={},
)
RECEIPT = Receipt(
    model="m",
    weights_hash=HASH,
    unquantized_weights_hash=HASH,
    quantization="w8a8",
    kv_cache_dtype="bfloat16",
    dtype="float32",
    backend="cpu",
    device="cpu",
    instruction_set="avx2",
    versions={"stet": "1"},
    date="2026-11-24T00:00:00+00:00",
    text=ReceiptText("a.txt", HASH, 1, 10),
    perplexity_unquantized=2.0,
    perplexity=2.01,
    mean_kl=0.001,
    top1_agreement=1.0,
    layer_errors=(0.01, 0.02),
    exact_match={"sum": ReceiptMatch(10, 0.5, 0.4)},
    weight_bytes_unquantized=20,
    weight_bytes=10,
)


def test_the_receipt_of_what_is_served(tmp_path: Path) -> None:
    assert find_receipt(tmp_path, IDENTITY) is None
    write_receipt(tmp_path, RECEIPT)
    with_int8_cache = dataclasses.replace(RECEIPT, kv_cache_dtype="int8", perplexity=2.02)
    write_receipt(tmp_path, with_int8_cache)
    found = find_receipt(tmp_path, IDENTITY)
    assert found == json.loads(json.dumps(dataclasses.asdict(RECEIPT)))
    other = find_receipt(tmp_path, dataclasses.replace(IDENTITY, kv_cache_dtype="int8"))
    assert other is not None
    assert other["perplexity"] == 2.02
    assert find_receipt(tmp_path, dataclasses.replace(IDENTITY, quantization="w8a16")) is None


def edited(**fields: Any) -> bytes:
    return json.dumps(dataclasses.asdict(RECEIPT) | fields).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff" * 10,
        b"[" * 10_000,
        edited(perplexity="2"),
        edited(text={}),
        edited(layer_errors=[None]),
        edited(weights_hash="cd" * 32),
        edited(quantization="w8a16"),
        edited(format=2),
        edited(model="x" * MAX_BYTES),
        json.dumps({"weights_hash": HASH}).encode(),
    ],
    ids=lambda data: data[:20].decode(errors="replace"),
)
def test_others_are_ignored_with_one_line(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "receipt-w8a8.json").write_bytes(data)
    with caplog.at_level(logging.INFO):
        assert find_receipt(tmp_path, IDENTITY) is None
    (record,) = caplog.records
    assert "receipt-w8a8.json is ignored" in record.getMessage()
    assert len(record.getMessage()) < 300
    assert "\n" not in record.getMessage()

"""Slower paths are counted by operator, once for each shape concerned."""

from __future__ import annotations

import logging

import pytest
import torch

from kernels.ops import AttentionMetadata, KVCacheSpec
from kernels.portable import PortableOps, attention, linear, sampling
from tests.kernels.cases import sampling as sampling_metadata


def test_none_is_taken_unasked() -> None:
    assert not PortableOps().fallbacks


def test_each_is_counted_once_and_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("kernels.portable.linear.rows_agree", lambda weight, workspace: False)
    monkeypatch.setattr(attention, "heights_agree", lambda *args: False)
    monkeypatch.setattr(sampling, "EXACT", 1.0)
    ops = PortableOps(dtype=torch.float32)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for _ in range(2):
            ops.prepare_linear(torch.randn(32, 64))
            cache = ops.allocate_kv_cache(KVCacheSpec(2, 64, 16, torch.float32), 4)
            plan = ops.plan(AttentionMetadata([3], [3], [[1]], 16))
            ops.paged_attention(torch.randn(3, 4, 64), cache, plan, 0.125)
        ops.sample(torch.zeros(1, 50), sampling_metadata(1))
    assert ops.fallbacks == {"linear": 1, "paged_attention": 1, "sample": 1}
    assert len(caplog.messages) == 2


def test_bf16_without_the_instructions_is_counted_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory of float32, read and multiplied as float32; int8 is at home there."""
    monkeypatch.setattr(linear, "packs", lambda dtype: dtype == torch.float32)
    ops = PortableOps(dtype=torch.bfloat16)
    for shape in ((32, 64), (32, 64), (64, 32)):
        assert ops.prepare_linear(torch.randn(shape)).nbytes == 2 * 32 * 64
    ops.prepare_linear(torch.randn(32, 64), mode="w8a16")
    ops.prepare_linear(torch.randn(32, 64), mode="w8a8")
    assert ops.fallbacks == {"linear": 2}

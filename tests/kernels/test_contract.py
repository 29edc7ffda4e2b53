"""Every backend has the protocol's methods, to the name; bad input is refused with a message that names it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionMetadata, KVCacheSpec, Ops, QuantizedActivations, QuantizedWeight, RotaryTable
from kernels.portable import PortableOps, linear
from kernels.reference import ReferenceOps
from tests.kernels.cases import sampling

BACKENDS = [ReferenceOps, PortableOps, CpuOps]
METHODS = [name for name, member in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_signatures_equal_the_protocol(backend: type, method: str) -> None:
    expected = inspect.signature(getattr(Ops, method)).parameters.values()
    actual = inspect.signature(getattr(backend, method)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in actual] == [(p.name, p.default, p.kind) for p in expected]
    assert getattr(backend, method).__doc__


def test_protocol_covers_what_a_decoder_needs() -> None:
    assert len(METHODS) == 24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (AttentionMetadata([], [], [], 16), "query_lens"),
        (AttentionMetadata([0], [3], [[0]], 16), r"query_lens\[0\] is 0"),
        (AttentionMetadata([4], [3], [[0]], 16), r"query_lens\[0\] is 4"),
        (AttentionMetadata([1], [17], [[0]], 16), r"block_tables\[0\] has 1 blocks; 17 tokens need 2"),
        (AttentionMetadata([1, 1], [1, 1], [[0]], 16), "differ in length"),
        (AttentionMetadata([1], [1], [[-1]], 16), "negative"),
        (AttentionMetadata([1], [1], [[0]], 0), "block_size"),
    ],
)
def test_bad_metadata_is_refused(backend: type, metadata: AttentionMetadata, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend().plan(metadata)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_and_plan_must_fit(backend: Callable[[], Ops]) -> None:
    ops = backend()
    cache = ops.allocate_kv_cache(KVCacheSpec(2, 8, 16, torch.float32), 4)
    query = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="block 4, kv_cache has 4"):
        ops.paged_attention(query, cache, ops.plan(AttentionMetadata([1], [1], [[4]], 16)), 1.0)
    with pytest.raises(ValueError, match="block size 8, kv_cache 16"):
        ops.paged_attention(query, cache, ops.plan(AttentionMetadata([1], [1], [[0]], 8)), 1.0)
    plan = ops.plan(AttentionMetadata([1], [1], [[0]], 16))
    with pytest.raises(ValueError, match="multiple"):
        ops.paged_attention(torch.zeros(1, 3, 8), cache, plan, 1.0)
    short = RotaryTable(torch.zeros(4, 4), torch.zeros(4, 4))
    key = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="rotary has 4 positions"):
        ops.write_kv(query, key, key, short, cache, ops.plan(AttentionMetadata([1], [5], [[0]], 16)))
    with pytest.raises(ValueError, match="query must be"):
        ops.write_kv(torch.zeros(2, 4, 8), key, key, short, cache, plan)
    with pytest.raises(ValueError, match="together"):
        ops.write_kv(query, key, key, short, cache, plan, torch.ones(8))
    with pytest.raises(ValueError, match="not allocated by this backend"):
        ops.paged_attention(query, object(), plan, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_operations_refuse_what_does_not_fit(backend: Callable[[], Ops]) -> None:
    ops, x, eight = backend(), torch.zeros(2, 8), torch.ones(8)
    plan = ops.plan(AttentionMetadata([2], [5], [[0]], 16))
    for call, message in [
        (lambda: ops.add(x, torch.zeros(2, 7)), r"residual must be \(2, 8\)"),
        (lambda: ops.add_layer_norm(x, torch.zeros(1, 8), eight, None, 1e-5), "residual must be"),
        (lambda: ops.layer_norm(x, torch.ones(7), None, 1e-5), r"weight must be \[H\]"),
        (lambda: ops.layer_norm(x, eight, torch.ones(7), 1e-5), r"bias must be \[H\]"),
        (lambda: ops.norm_query_key(x, x, eight, torch.ones(4), 1e-5), "key_weight must be"),
        (lambda: ops.add_positions(x, torch.zeros(9, 7), plan), r"table must be \[P, H\]"),
        (lambda: ops.add_positions(x, torch.zeros(4, 8), plan), "table has 4 positions; a sequence has 5 tokens"),
        (lambda: ops.softcap(x, 0.0), "cap is 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_refuse_what_does_not_fit(backend: Callable[[], Ops]) -> None:
    ops, x = backend(), torch.zeros(2, 16)
    for rows in (40, 48):
        with pytest.raises(ValueError, match="N a multiple of 16; got"):
            ops.prepare_experts(torch.zeros(rows, 16), 2)
    router, gate_up, down = (
        ops.prepare_linear(torch.zeros(2, 16)),
        ops.prepare_experts(torch.zeros(64, 16), 2),
        ops.prepare_experts(torch.zeros(32, 16), 2),
    )
    assert ops.experts(x, router, gate_up, down, 2, True).shape == (2, 16)
    for arguments, message in [
        ((x, router, gate_up, down, 3), "top_k is 3; there are 2 experts"),
        ((torch.zeros(2, 8), router, gate_up, down, 1), r"router must be an unquantized \[E, H\]"),
        ((x, ops.prepare_linear(torch.zeros(2, 16), mode="w8a16"), gate_up, down, 1), "router must be an unquantized"),
        ((x, router, down, down, 1), r"gate_up must hold 2 weights \[32, 16\]"),
        ((x, ops.prepare_linear(torch.zeros(3, 16)), gate_up, down, 1), "gate_up must hold 3 weights"),
        ((x, router, object(), down, 1), "prepare_experts"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.experts(*arguments, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_refuses_what_it_does_not_know(backend: Callable[[], Ops]) -> None:
    ops = backend()
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        ops.prepare_linear(torch.zeros(3))
    with pytest.raises(ValueError, match="prepare_linear"):
        ops.linear(torch.zeros(1, 4), object())  # type: ignore[arg-type]
    quantized = QuantizedActivations(torch.zeros(1, 4, dtype=torch.int8), torch.zeros(1))
    for mode in ("none", "w8a16"):
        with pytest.raises(ValueError, match=f"x is quantized; a weight of mode '{mode}'"):
            ops.linear(quantized, ops.prepare_linear(torch.zeros(3, 4), mode=mode))
    values, scales = torch.zeros(3, 4, dtype=torch.int8), torch.zeros(3)
    for weight, message in [
        (QuantizedWeight(values, scales[:2]), r"scales must be \[3\]"),
        (QuantizedWeight(values.float(), scales), "int8 with float32 scales"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.prepare_linear(weight, mode="w8a8")
    with pytest.raises(ValueError, match="mode must be 'w8a16' or 'w8a8'"):
        ops.prepare_linear(QuantizedWeight(values, scales))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperatures": [1.0]}, "temperatures has 1 entries for 2 rows"),
        ({"temperatures": -0.5}, "temperatures holds -0.5"),
        ({"top_ps": float("nan")}, "top_ps holds nan"),
        ({"top_ks": -1}, "top_ks holds -1"),
        ({"min_ps": 1.5}, "min_ps holds 1.5"),
        ({"typical_ps": -1.0}, "typical_ps holds -1.0"),
        ({"seeds": [1 << 64, 0]}, "seeds holds"),
        ({"positions": -1}, "positions holds -1"),
        ({"repetition_penalties": 0.0}, "repetition_penalties holds 0.0"),
        ({"frequency_penalties": float("inf")}, "frequency_penalties holds inf"),
        ({"biases": [(0, 9, 1.0)]}, "biases names row 0, token 9"),
        ({"biases": [(0, 1, float("nan"))]}, "biases holds nan"),
        ({"allowed": {2: [1]}}, "allowed names row 2"),
        ({"allowed": {0: []}}, r"allowed\[0\] is empty"),
        ({"output_tokens": {1: [7]}}, r"output_tokens\[1\] holds a token id outside"),
    ],
)
def test_bad_sampling_is_refused(backend: Callable[[], Ops], fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend().sample(torch.zeros(2, 7), sampling(2, **fields))


def test_portable_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="float16"):
        PortableOps(dtype=torch.float16)
    with pytest.raises(ValueError, match="threads is 0"):
        PortableOps(threads=0)
    ops = PortableOps(dtype=torch.float32)
    with pytest.raises(ValueError, match="must divide 64"):
        ops.allocate_kv_cache(KVCacheSpec(2, 8, 48, torch.float32), 4)
    with pytest.raises(ValueError, match="bfloat16, float32 or int8"):
        ops.allocate_kv_cache(KVCacheSpec(2, 8, 16, torch.float16), 4)
    with pytest.raises(ValueError, match="below 32768"):
        ops.rms_norm(torch.zeros(1, 40000), torch.zeros(40000), 1e-6)
    with pytest.raises(ValueError, match="gate_up"):
        ops.silu_mul(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be \[T, 4\]"):
        ops.linear(torch.zeros(1, 5), ops.prepare_linear(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match="bias must be"):
        ops.prepare_linear(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="int32 sums of w8a8 hold up to 133144"):
        ops.prepare_linear(torch.zeros(1, 133145), mode="w8a8")
    with pytest.raises(ValueError, match="with `embedding`"):
        ops.embedding(torch.tensor([0]), ops.prepare_linear(torch.zeros(3, 4)))
    # A library whose float32 sums are not what IEEE 754 says, for example by adding in fewer bits.
    call = linear._call
    monkeypatch.setattr(linear, "_call", lambda *args: call(*args).bfloat16().float())
    with pytest.raises(ValueError, match="'w8a8' needs exact sums"):
        PortableOps(dtype=torch.float32).prepare_linear(torch.zeros(3, 4), mode="w8a8")

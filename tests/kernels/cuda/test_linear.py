"""The linear kernels: against the reference, and the same bits whatever the number of rows and whoever adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cuda import linear as linear_module
from kernels.cuda import tuned
from kernels.cuda.common import device_type
from kernels.cuda.linear import CudaLinear, launch, linear, prepare
from kernels.cuda.norm import quantize
from kernels.cuda.workspace import Workspace
from kernels.ops import QuantizationMode, QuantizedActivations
from kernels.reference import ReferenceOps

DEVICE = torch.device(device_type())
MODES: list[QuantizationMode] = ["none", "w8a16", "w8a8"]
# Half a unit in the last place of the dtype, and float32 sums in another order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def run(weight: CudaLinear, x: Tensor, workspace: Workspace | None = None) -> Tensor:
    return linear(quantize(x) if weight.mode == "w8a8" else x, weight, workspace or Workspace(DEVICE))


def integers(*shape: int) -> Tensor:
    """Small integers: their sums are exact in any order, so that the interpreter (NumPy) has one answer."""
    return torch.randint(-3, 4, shape, device=DEVICE).float()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n", "k", "rows", "bias"), [(100, 80, 3, True), (192, 1056, 17, False), (130, 520, 130, True), (1, 1, 1, True)]
)
def test_against_reference(mode: QuantizationMode, dtype: torch.dtype, n: int, k: int, rows: int, bias: bool) -> None:
    """Odd sizes, one row and many, with and without segments."""
    w, x = torch.randn(n, k).to(dtype), torch.randn(rows, k).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    weight = prepare(w, b, mode, DEVICE, dtype)
    assert (weight.out_features, weight.in_features) == (n, k)
    reference = ReferenceOps()
    prepared = reference.prepare_linear(w.float(), None if b is None else b.float(), mode)
    expected = reference.linear(x.float(), prepared)
    got = run(weight, x.to(DEVICE)).float().cpu()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) * 0.1)


def test_int8_product_is_exact() -> None:
    """The largest sums, in both signs, against 64-bit integers."""
    n, k, rows = 70, 2064, 9
    weight = prepare(torch.randn(n, k), None, "w8a8", DEVICE, torch.float32)
    weight.weight[0], weight.weight[1] = 127, -127
    values = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=DEVICE)
    values[0] = 127
    scales = torch.rand(rows, device=DEVICE)
    exact = (values.cpu().long() @ weight.weight.cpu().long().T).to(DEVICE)
    assert weight.scales is not None
    expected = exact.float() * scales[:, None] * weight.scales
    for split in (False, True):
        assert torch.equal(_forced(weight, values, scales, split), expected)


def _forced(weight: CudaLinear, x: Tensor, scales: Tensor | None, split: bool) -> Tensor:
    """The product with the segments in programs of their own, or walked by one."""
    chosen = launch(weight.mode, weight.dtype, weight.out_features, weight.in_features, x.shape[0], None, split)
    assert chosen.segments > 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "launch", lambda *_: chosen)
        return linear(x if scales is None else QuantizedActivations(x, scales), weight, Workspace(DEVICE))


@pytest.mark.parametrize("mode", MODES)
def test_rows_alone_equal_rows_together(mode: QuantizationMode) -> None:
    """Each side of every border between tiles; then both ways of adding the segments."""
    w = integers(80, 528)
    weight = prepare(w, integers(80), mode, DEVICE, torch.bfloat16)
    assert launch(mode, torch.bfloat16, 80, 528, 1).segments > 1
    x = integers(130, 528).to(torch.bfloat16)
    x[:, 0] = 3  # one scale for all rows
    workspace = Workspace(DEVICE)
    alone = torch.cat([run(weight, x[i : i + 1], workspace) for i in (0, 7, 64, 129)])
    for rows in (8, 9, 16, 17, 33, 65, 130):
        together = run(weight, x[:rows], workspace)
        picked = [i for i in (0, 7, 64, 129) if i < rows]
        assert torch.equal(together[picked], alone[: len(picked)])
    counters = workspace.take("linear counters", (1,), torch.int32)
    assert counters.eq(0).all()
    quantized = quantize(x)
    values, scales = (quantized.values, quantized.scales) if mode == "w8a8" else (x, None)
    assert torch.equal(_forced(weight, values, scales, True), _forced(weight, values, scales, False))


@pytest.mark.parametrize("split", [True, False])
def test_segments_are_added_in_order(split: bool) -> None:
    """2^25 + 1 - 2^25 + 1 in float32 is 1 from left to right, and something else in any other order."""
    n, k = 64, 1024
    segments, length = tuned.segments("none", torch.float32, n, k)
    assert (segments, length) == (4, 256)
    w = torch.zeros(n, k, device=DEVICE)
    w[:, 0], w[:, length], w[:, 2 * length], w[:, 3 * length] = 2.0**25, 1, -(2.0**25), 1
    weight = prepare(w, None, "none", DEVICE, torch.float32)
    assert _forced(weight, torch.ones(40, k, device=DEVICE), None, split).eq(1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_faults_stay_in_their_row(mode: QuantizationMode) -> None:
    """A NaN and an infinity show in their own rows only; the rows that fill a tile up are written nowhere."""
    weight = prepare(torch.randn(100, 600), None, mode, DEVICE, torch.float32)
    x = torch.randn(11, 600, device=DEVICE)
    clean = run(weight, x)
    x[2, 5], x[10, 599] = float("nan"), float("inf")
    workspace = Workspace(DEVICE)
    workspace.take("linear partials", (1 << 18,), torch.float32).fill_(float("nan"))
    out = run(weight, x, workspace)
    faulty = [2, 10]
    sound = [i for i in range(11) if i not in faulty]
    assert not torch.isfinite(out[faulty]).any()
    assert torch.equal(out[sound], clean[sound])


def test_candidates_give_the_same_bits() -> None:
    """Every tile of the sweep."""
    n, k, rows = 200, 512, 70
    weight, x = prepare(integers(n, k), None, "none", DEVICE, torch.bfloat16), integers(rows, k).to(torch.bfloat16)
    expected = run(weight, x)
    for tile in tuned.candidates("none", torch.bfloat16, n, k, rows):
        chosen = launch("none", torch.bfloat16, n, k, rows, tile)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_module, "launch", lambda *_, chosen=chosen: chosen)
            assert torch.equal(run(weight, x), expected)


def test_what_decides_the_bits_ignores_the_rows() -> None:
    for mode in MODES:
        for dtype in (torch.bfloat16, torch.float32):
            for n, k in ((1024, 3072), (4096, 4096), (6144, 4096), (28672, 4096), (100, 80)):
                launches = [launch(mode, dtype, n, k, rows) for rows in (1, 8, 9, 64, 65, 257, 4096)]
                assert len({(how.segments, how.segment_k, how.tile.block_k) for how in launches}) == 1
                assert (launches[0].segments - 1) * launches[0].segment_k < k
                assert all(how.tile.block_n >= 64 for how in launches)


def test_sharing_and_errors() -> None:
    w = torch.randn(16, 32, device=DEVICE)
    weight = prepare(w, None, "none", DEVICE, torch.float32)
    assert weight.weight.data_ptr() == w.data_ptr()  # tied embeddings are stored once
    workspace = Workspace(DEVICE)
    x = torch.randn(2, 32, device=DEVICE)
    assert linear(x[:0], weight, workspace).shape == (0, 16)
    for bad in (x.bfloat16(), x[:, :16], torch.randn(32, 2, device=DEVICE).T, quantize(x)):
        with pytest.raises(ValueError, match="x "):
            linear(bad, weight, workspace)
    with pytest.raises(ValueError, match="x is not quantized"):
        linear(x, prepare(w, None, "w8a8", DEVICE, torch.float32), workspace)
    with pytest.raises(ValueError, match="bias"):
        prepare(w, torch.zeros(3), "none", DEVICE, torch.float32)
    with pytest.raises(ValueError, match="input features"):
        prepare(torch.zeros(1, 131_072), None, "w8a8", DEVICE, torch.float32)
    with pytest.raises(ValueError, match="mode"):
        prepare(w, None, "w4", DEVICE, torch.float32)  # type: ignore[arg-type]

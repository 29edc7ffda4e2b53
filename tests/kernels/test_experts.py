"""A mixture of experts on every backend: the rule for ties, the reference's numbers, and rows that do not meet."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cpu.ops import CpuOps
from kernels.cuda.ops import CudaOps
from kernels.int8 import quantize_rows
from kernels.ops import Ops, QuantizationMode, QuantizedWeight
from kernels.portable import PortableOps
from kernels.reference import ReferenceOps
from tests.kernels.cpu.test_ops import EVERY_OPS

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, INNER, COUNT = 48, 32, 9
BACKENDS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "portable": functools.partial(PortableOps, dtype=torch.float32),
    "cpu": functools.partial(CpuOps, 1),
    "cuda": functools.partial(CudaOps, torch.float32),
}
MODES: list[QuantizationMode] = ["none", "w8a16", "w8a8"]


@functools.cache
def weights() -> tuple[Tensor, Tensor, Tensor]:
    """Router, gate_up and down of all experts."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((COUNT, HIDDEN), (COUNT * 2 * INNER, HIDDEN), (COUNT * HIDDEN, INNER))
    router, gate_up, down = (torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes)
    router[5] = router[2]  # a tie in every row
    return router, gate_up, down


def compute(ops: Ops, x: Tensor, mode: QuantizationMode = "none", top_k: int = 3, normalize: bool = False) -> Tensor:
    router, gate_up, down = weights()
    prepared = (ops.prepare_experts(weight, COUNT, mode) for weight in (gate_up, down))
    return ops.experts(x.to(ops.device), ops.prepare_linear(router), *prepared, top_k, normalize).cpu()


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", list(BACKENDS)[1:])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("top_k", "normalize"), [(1, True), (3, False), (COUNT, True)])
def test_against_reference(backend: str, mode: QuantizationMode, top_k: int, normalize: bool) -> None:
    x = rows(23)
    expected = compute(ReferenceOps(), x, mode, top_k, normalize)
    actual = compute(BACKENDS[backend](), x, mode, top_k, normalize)
    # w8a8: a value between two integers may be rounded to either side.
    tolerance = 1e-2 if mode == "w8a8" else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_the_lower_index_wins_a_tie(backend: str) -> None:
    """Experts 2 and 5 have equal logits. Of the two, only 2 may be taken where one place is left."""
    router, gate_up, down = (weight.clone() for weight in weights())
    x = rows(40)
    best = (x @ router.T).argmax(-1) == 2  # 5 is equal, and so never first
    assert best.sum() > 2
    without = down.clone().view(COUNT, HIDDEN, INNER)
    without[5] = float("nan")
    ops = BACKENDS[backend]()
    prepared = ops.prepare_experts(gate_up, COUNT), ops.prepare_experts(without.flatten(0, 1), COUNT)
    y = ops.experts(x[best].to(ops.device), ops.prepare_linear(router), *prepared, 1, True)
    assert torch.isfinite(y).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter's
@pytest.mark.parametrize("backend", list(BACKENDS)[1:])
@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_meet(backend: str, mode: QuantizationMode) -> None:
    """The bits of a row alone, among few, among many, and beside one that is not finite."""
    ops, x = BACKENDS[backend](), rows(100)  # enough for the larger of the CUDA backend's tiles
    x[7, 3] = float("nan")
    whole = compute(ops, x, mode)
    assert torch.isfinite(whole).all(-1).logical_not().nonzero().flatten().tolist() == [7]
    for start, stop in ((0, 1), (2, 5), (20, 60)):
        assert torch.equal(compute(ops, x[start:stop], mode), whole[start:stop])


@pytest.mark.parametrize("mode", MODES)
def test_the_compiled_kernels_have_one_set_of_bits(mode: QuantizationMode) -> None:
    first, *others = (compute(ops, rows(61), mode) for ops in EVERY_OPS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_quantized_weights_are_taken_as_they_are(backend: str) -> None:
    ops, (router, gate_up, down) = BACKENDS[backend](), weights()
    x = rows(5)
    expected = compute(ops, x, "w8a16")
    prepared = (ops.prepare_experts(QuantizedWeight(*quantize_rows(w)), COUNT, "w8a16") for w in (gate_up, down))
    actual = ops.experts(x.to(ops.device), ops.prepare_linear(router), *prepared, 3, False).cpu()
    assert torch.equal(actual, expected)

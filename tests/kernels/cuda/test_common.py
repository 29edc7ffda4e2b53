"""The few operations that all kernels build on: the same in the interpreter and on a GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.cuda import common
from kernels.cuda.common import device_type, dot, round_half_even, round_to
from kernels.cuda.upload import Upload
from kernels.cuda.workspace import Workspace

DEVICE = torch.device(device_type())


@triton.jit
def _round(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, round_to(tl.load(x_ptr + index), out_ptr.dtype.element_ty))


@triton.jit
def _round_half_even(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, round_half_even(tl.load(x_ptr + index)))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    a = tl.load(a_ptr + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    acc = dot(a, b, tl.zeros([M, N], tl.float32))
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], acc)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # the interpreter's, for float16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    """Every pattern of the upper 16 bits, with lower bits at, just below and just above the half."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] + lower).reshape(-1)
    x = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    out = torch.full((len(x),), -7.0, dtype=dtype, device=DEVICE)
    x = x.to(DEVICE)
    for piece in range(0, len(x), 1 << 16):
        _round[(1,)](x[piece : piece + (1 << 16)], out[piece : piece + (1 << 16)], BLOCK=1 << 16)
    expected = x.to(dtype)
    finite = ~torch.isnan(expected)
    assert torch.equal(out[finite], expected[finite])
    assert torch.isnan(out[~finite]).all()


def test_halves_go_to_even() -> None:
    x = torch.cat([torch.arange(-64, 64) / 4, torch.randn(128) * 1e6]).float().to(DEVICE)
    out = torch.empty_like(x)
    _round_half_even[(1,)](x, out, BLOCK=256)
    assert torch.equal(out, torch.round(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_a_matrix_product(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 32, device=DEVICE).to(dtype), torch.randn(32, 64, device=DEVICE).to(dtype)
    out = torch.full((16, 64), float("nan"), device=DEVICE)
    _dot[(1,)](a, b, out, 16, 32, 64)
    exact = a.double() @ b.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_upload_packs_and_keeps_addresses() -> None:
    upload = Upload(DEVICE, capacity_bytes=256)
    addresses = []
    for step in range(5):
        integers = upload.put(np.arange(5, dtype=np.int32) + step)
        matrix = upload.put(np.full((2, 3), step + 0.5, dtype=np.float32))
        large = upload.put(np.arange(100, dtype=np.int64) * step)  # beyond the capacity: by itself
        upload.send()
        assert integers.tolist() == [step, step + 1, step + 2, step + 3, step + 4]
        assert matrix.tolist() == [[step + 0.5] * 3] * 2
        assert large.tolist() == [i * step for i in range(100)]
        assert matrix.data_ptr() % 16 == 0
        addresses.append((integers.data_ptr(), matrix.data_ptr()))
    assert len(set(addresses)) == 1
    with pytest.raises(ValueError, match="float64"):
        upload.put(np.zeros(3))


def test_workspace_never_frees_what_a_graph_may_hold() -> None:
    workspace = Workspace(DEVICE)
    first = workspace.take("a", (4, 4), torch.float32)
    assert workspace.take("a", (2, 3), torch.float32).data_ptr() == first.data_ptr()
    counters = workspace.take("a", (8,), torch.int32, zeroed=True)
    assert counters.eq(0).all()
    larger = workspace.take("a", (8, 8), torch.float32)
    assert larger.data_ptr() != first.data_ptr()
    assert workspace.nbytes == (16 + 8 + 64) * 4


def test_every_launch_says_whether_products_and_sums_may_be_fused() -> None:
    """Versions of Triton differ in what they do where nothing is said, and fused or not the bits are others. What is
    compiled ahead of time is compiled so."""
    launches = []
    for path in sorted(Path(common.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            # kernel[grid](...), where other calls of what is subscripted have no keywords
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and node.keywords:
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                launches.append((path.name, ast.unparse(node.func), options.get("enable_fp_fusion")))
    assert len(launches) > 20
    assert [launch for launch in launches if launch[2] != "True"] == []

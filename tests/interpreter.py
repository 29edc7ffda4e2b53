"""Triton's interpreter as the tests want it: sums in one order for every shape, and the language patched once.

Both are private in Triton (3.6 to 3.9); if they move, installing fails loudly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def install() -> None:
    """Change the interpreter of this process for good. Kernels that were imported before are changed as well."""
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_dot = ordered_dot
    interpreter._patch_lang = patched_once(interpreter._patch_lang, interpreter._LangPatchScope)


def ordered_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """a [M, K] @ b [K, N] + d, adding along K from first to last, whatever M and N are.

    The interpreter takes np.matmul, whose order of sums depends on the BLAS, the processor and the number of rows: a
    kernel could not show the same bits for a row in tiles of different heights. A GPU's instruction has one order.
    """
    from triton.runtime.interpreter import TensorHandle

    left, right = a.data, b.data
    if d.data.dtype == np.int32:  # of int8: exact in float64, in any order
        product = np.matmul(left.astype(np.float64), right.astype(np.float64)).astype(np.int32)
        return TensorHandle(product + d.data, d.dtype.scalar)
    if left.dtype != np.float32 or d.data.dtype != np.float32:
        raise TypeError(f"the kernels multiply float32 or int8 here, got {left.dtype} into {d.data.dtype}")
    total = np.zeros(d.data.shape, np.float32)
    term = np.empty_like(total)
    for k in range(left.shape[1]):
        np.multiply(left[:, k : k + 1], right[k], out=term)
        total += term
    return TensorHandle(total + d.data, d.dtype.scalar)


def patched_once(patch: Callable[[Any], Any], nothing: Callable[[], Any]) -> Callable[[Any], Any]:
    """The interpreter swaps some hundred functions of triton.language at every call of every function, and back after
    each launch: two fifths of its time (by cProfile, for kernels of one small model). Here they stay."""
    done = set()

    def once(function: Any) -> Any:
        if function not in done:
            patch(function)
            done.add(function)
        return nothing()

    return once

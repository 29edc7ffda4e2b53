"""Every kernel, compiled ahead of time for GPUs that are not here: registers, shared memory, matrix instructions.

The interpreter shows that the kernels compute the right numbers; this shows that they compile, that what runs in every
step does not spill, and that every product of matrices uses one family of instructions. The whole table is compared
with the committed one, which `python -m kernels.cuda.compile > tests/kernels/cuda/compiled.txt` makes anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from kernels.cuda.compile import CAPABILITIES, HEADER, MODULES, Compiled, order_problems

COMMITTED = Path(__file__).with_name("compiled.txt")


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """All variants on all capabilities, from processes without the interpreter: two, as there are two cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    halves = (MODULES[: len(MODULES) // 2], MODULES[len(MODULES) // 2 :])
    processes = []
    for half in halves:
        command = [sys.executable, "-m", "kernels.cuda.compile", "--json"]
        for module in half:
            command += ["--module", module]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    rows: list[dict[str, Any]] = [json.loads(line) for output in outputs for line in output.splitlines()]
    results = [Compiled(**{n: tuple(v) if isinstance(v, list) else v for n, v in row.items()}) for row in rows]
    order = {name: index for index, name in enumerate(MODULES)}
    return sorted(results, key=lambda result: (result.capability, order[result.module]))


def test_no_variant_breaks_the_rules(compiled: list[Compiled]) -> None:
    print("\n".join([HEADER, *(result.line() for result in compiled)]))
    assert {(result.capability, result.module) for result in compiled} == {
        (capability, module) for capability in CAPABILITIES for module in MODULES
    }
    problems = [f"{result.line()}: {'; '.join(result.problems)}" for result in compiled if result.problems]
    assert not problems, "\n".join(problems)


def test_what_must_agree_to_the_bit_sums_in_one_order(compiled: list[Compiled]) -> None:
    """Decode and prompts, with and without quantization: how a row lies in threads decides the order of its sums."""
    groups: dict[tuple[int, str, str], set[tuple[str, ...]]] = {}
    members: dict[tuple[int, str, str], int] = {}
    for result in compiled:
        if result.same_order:
            key = (result.capability, result.module, result.same_order)
            groups.setdefault(key, set()).add(result.order)
            members[key] = members.get(key, 0) + 1
    assert {module for _, module, _ in groups} == {"attention", "layer_norm", "norm"}
    assert sum(count > 1 for count in members.values()) >= 3 * len(CAPABILITIES)
    assert all(order for orders in groups.values() for order in orders)
    differing = {key: orders for key, orders in groups.items() if len(orders) > 1}
    assert not differing


def test_table_is_the_committed_one(compiled: list[Compiled]) -> None:
    first, header, *lines = COMMITTED.read_text().splitlines()
    if first != f"Triton {triton.__version__}":
        pytest.skip(f"the committed table is of {first}")
    assert header == HEADER
    assert [result.line() for result in compiled] == lines


def test_sums_that_programs_hand_on_must_be_ordered() -> None:
    """What the interpreter, with its one thread, cannot miss. The variants themselves pass the first test above."""
    lines = ["st.global.v4.b32 [%rd1], %r1;", "bar.sync 0;", "@%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%rd2], 1;",
             "bar.sync 0;", "st.global.b32 [%rd2], 0;", "ld.global.v4.b32 %r3, [%rd1];"]  # fmt: skip
    assert order_problems("\n".join(lines)) == []
    for missing in (1, 3):
        text = "\n".join(lines[:missing] + lines[missing + 1 :])
        assert order_problems(text) == ["atom.global.gpu.acq_rel.add.u32 has no barrier before or behind it"]
    for other in ("relaxed", "cta.acq_rel"):
        text = "\n".join(lines).replace("gpu.acq_rel", other)
        assert order_problems(text) == [f"atom.global.{other}.add.u32 orders nothing on the device"]

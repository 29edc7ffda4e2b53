"""Ahead-of-time compilation of the kernels for a GPU that need not be there, and what the machine code tells.

A kernel's module lists its `Variant`s: the combinations of types, constants and alignment that service can meet.
`compile_variant` runs Triton's compiler for compute capability 8.0, 9.0 or 10.0 and reads from the result the registers
and stack of a thread, the shared memory of a block, and the matrix instruction: the facts that decide a kernel's speed
and, for the matrix instruction, its bits. Not possible in a process with TRITON_INTERPRET=1.

    python -m kernels.cuda.compile [--capability 90] [--json]      prints the table of all variants
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""The most shared memory that one block may have, by capability (CUDA C++ Programming Guide, table of capabilities)."""

MODULES = (
    "attention",
    "kv_cache",
    "linear",
    "experts",
    "norm",
    "layer_norm",
    "activation",
    "pointwise",
    "sampling",
    "plan",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with everything fixed that decides its machine code.

    name       unique within its module, such as "decode d128 bf16"
    fn         the @triton.jit function
    signature  type of every parameter that is no constant: "*bf16", "*i32", "i32", "fp32", "tensordesc<…>"
    constants  value of every tl.constexpr parameter
    aligned    parameters that are multiples of 16: pointers, strides, sizes
    num_warps, num_stages   as launched
    hot        it runs in every step: it must not spill registers
    matrix     whether it must use the tensor cores
    same_order variants of one module with the same text here must sum floats in one order: their results are promised
               to agree to the bit
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True
    matrix: bool = False
    same_order: str = ""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a variant on one capability.

    registers, stack_bytes  of a thread; a stack means spilled registers
    shared_bytes            of a block
    matrix                  the tensor-core instructions, such as "wgmma m64n16k16", sorted; empty if there is none
    tma                     whether tiles come through the tensor memory accelerator
    same_order              that of the variant
    order                   how floats lie in threads where they are reduced, and in matrix products, which decides the
                            order of the sum
    problems                what breaks this project's rules for kernels, in words; empty if all is well
    """

    module: str
    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: tuple[str, ...]
    tma: bool
    same_order: str
    order: tuple[str, ...]
    problems: tuple[str, ...]

    def line(self) -> str:
        """One line of the table."""
        text = f"sm_{self.capability:<4}{self.module:12}{self.name:44}{self.registers:4}{self.stack_bytes:6}"
        marks = ", ".join((*self.matrix, *(("tma",) if self.tma else ())))
        return f"{text}{self.shared_bytes:8}  {marks}".rstrip()


HEADER = f"{'':7}{'module':12}{'variant':44}{'reg':>4}{'stack':>6}{'shared':>8}  tensor cores"
"""Of the table: registers and stack bytes of a thread, shared bytes of a block."""

# The tensor-core instruction of each capability: the one that every bf16 and int8 product must use, since two families
# may round differently and a row's bits must not depend on the number of rows beside it.
FAMILIES = {80: "mma", 90: "wgmma", 100: "tcgen05"}


_MODEL_CONSTANT = re.compile("stride|^[A-Z]")


def all_variants(capability: int) -> Iterator[tuple[str, Variant]]:
    """(module, variant) of every kernel in this package."""
    for name in MODULES:
        module = importlib.import_module(f"kernels.cuda.{name}")
        for variant in module.variants(capability):
            yield name, variant


def compile_variant(module: str, variant: Variant, capability: int) -> Compiled:
    """Compile and inspect. Raises what Triton raises for a kernel that does not compile."""
    names = variant.fn.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    unknown = {*variant.signature, *variant.constants, *variant.aligned} - set(names)
    missing = {n for n, kind in signature.items() if kind == "constexpr"} - set(variant.constants)
    if unknown or missing:
        raise ValueError(f"{module}, {variant.name}: unknown parameters {unknown}, parameters without value {missing}")
    source = ASTSource(
        fn=variant.fn,
        signature=signature,
        constexprs=dict(variant.constants),
        # In one order in every process: it is part of the key under which Triton keeps what it has compiled.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(variant.aligned)},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack_bytes = _resources(kernel.asm["cubin"])
    ptx, shared_bytes = kernel.asm["ptx"], kernel.metadata.shared
    matrix = _matrix_instructions(ptx)
    problems = [*_specialization_problems(variant), *order_problems(ptx)]
    if variant.hot and stack_bytes:
        problems.append(f"spills {stack_bytes} bytes")
    if shared_bytes > SHARED_MEMORY_BYTES[capability]:
        problems.append(f"needs {shared_bytes} bytes of shared memory; there are {SHARED_MEMORY_BYTES[capability]}")
    if variant.matrix and {instruction.split()[0] for instruction in matrix} != {FAMILIES[capability]}:
        problems.append(f"must use {FAMILIES[capability]} and nothing else, uses {matrix}")
    return Compiled(
        module=module,
        name=variant.name,
        capability=capability,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        matrix=matrix,
        tma="cp.async.bulk.tensor" in ptx,
        same_order=variant.same_order,
        order=_reduction_orders(kernel.asm["ttgir"]),
        problems=tuple(problems),
    )


def _specialization_problems(variant: Variant) -> list[str]:
    """Integers that vary from step to step must not be compiled into the code: a value of 1, or one divisible by 16,
    would make another variant in the middle of service. What is the model's may: strides, and sizes in capitals."""
    problems = []
    for parameter in variant.fn.params:
        kind = variant.signature.get(parameter.name, "constexpr")
        if kind in ("i32", "i64") and not parameter.do_not_specialize and not _MODEL_CONSTANT.search(parameter.name):
            problems.append(f"{parameter.name} is specialized on its value")
        if parameter.do_not_specialize and parameter.name in variant.aligned:
            problems.append(f"{parameter.name} is not specialized, so it is never known to be aligned")
    return problems


def order_problems(ptx: str) -> list[str]:
    """Where programs leave sums in memory for the one that arrives last, as PTX's memory model wants it: every thread
    has stored, a barrier, one thread's atomic that releases and acquires for the whole device, a barrier, the loads."""
    problems = []
    found = re.findall(r"\b(bar\.sync|st\.global|ld\.global|(?:atom|red)\.global[\w.]*)", ptx)
    for index, instruction in enumerate(found):
        if instruction.startswith(("atom", "red")):
            before = next((each for each in reversed(found[:index]) if each != "ld.global"), "")
            after = next((each for each in found[index + 1 :] if each != "st.global"), "bar.sync")
            if ".gpu.acq_rel." not in instruction:
                problems.append(f"{instruction} orders nothing on the device")
            if (before, after) != ("bar.sync", "bar.sync"):
                problems.append(f"{instruction} has no barrier before or behind it")
    return problems


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the disassembler that comes with Triton tells them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {text!r}")
    return int(found[1]), int(found[2])


def _reduction_orders(ttgir: str) -> tuple[str, ...]:
    """The layout of every float tensor that is reduced, and of the results of matrix products, sorted.

    Warps that lie along other dimensions than the reduced one only take other rows: their number is left out; of a
    product, that of the warps along its rows.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttn?g\.\w+<.*>)$", ttgir, re.MULTILINE))
    reductions = re.finditer(
        r'"tt\.reduce"\(.*?<\{axis = (\d+) : i32\}>.*?\}\) : \(tensor<([\dx]+)xf32, (#\w+)>\)', ttgir, re.DOTALL
    )
    found: set[str] = set()
    for axis, shape, alias in (match.groups() for match in reductions):
        lengths = shape.split("x")
        lengths = [length if index == int(axis) else "*" for index, length in enumerate(lengths)]
        layout = _without_other_warps(layouts[alias], int(axis))
        found.add(f"axis {axis} of [{', '.join(lengths)}] in {layout}")
    products = ("#ttg.nvidia_mma<", "#ttng.tensor_memory_encoding<")
    found |= {_without_other_warps(layout, 1) for layout in layouts.values() if layout.startswith(products)}
    return tuple(sorted(found))


def _without_other_warps(layout: str, axis: int) -> str:
    """The layout with * for the number of warps along other dimensions than `axis`."""

    def hide(match: re.Match[str]) -> str:
        counts = match[1].split(", ")
        return f"warpsPerCTA = [{', '.join(c if i == axis else '*' for i, c in enumerate(counts))}]"

    return re.sub(r"warpsPerCTA = \[([^\]]*)\]", hide, layout)


def _matrix_instructions(ptx: str) -> tuple[str, ...]:
    """Family and shape of every tensor-core instruction in the code."""
    found: set[str] = set()
    for match in re.finditer(r"\b(mma\.sync|wgmma\.mma_async)\S*?\.(m\d+n\d+k\d+)\b", ptx):
        found.add(f"{match[1].split('.')[0]} {match[2]}")
    for match in re.finditer(r"\btcgen05\.mma\S*?\.kind::(\w+)", ptx):
        found.add(f"tcgen05 {match[1]}")
    return tuple(sorted(found))


def main() -> None:
    """Compile everything and print a table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.cuda.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append", help="default: all")
    parser.add_argument("--module", choices=MODULES, action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"Triton {triton.__version__}\n{HEADER}")
    for capability in arguments.capability or CAPABILITIES:
        for module, variant in all_variants(capability):
            if arguments.module and module not in arguments.module:
                continue
            result = compile_variant(module, variant, capability)
            print(json.dumps(asdict(result)) if arguments.json else result.line(), flush=True)
            if result.problems and not arguments.json:
                print(f"{'':7}^ {'; '.join(result.problems)}", flush=True)


if __name__ == "__main__":
    main()

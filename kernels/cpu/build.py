"""Compile `csrc/` into one shared library: `python -m kernels.cpu.build`. Called when the project is installed.

The library is plain C at its border, so that nothing but a C++17 compiler is needed: no Python headers, no torch. It
holds the kernels once for each instruction set and picks at run time, so it runs on every processor of its
architecture. Its name carries a hash of the sources and of these flags: a library of other sources is never loaded.

This module imports nothing of the project and only the standard library, so that an installer can run it alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARIES = HERE / "lib"

# -ffp-contract=off: products and sums are fused where the source says so, and nowhere else, whatever the compiler.
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")
# GCC's own headers for AVX-512 start from variables that are deliberately left undefined.
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-function")
X86_SETS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mprfchw"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
}


class BuildError(Exception):
    """Why there is no library. One line for a person."""


def library_path() -> Path:
    """Where the library of the current sources is, or would be."""
    digest = hashlib.sha256(repr((FLAGS, QUIET, X86_SETS, platform.machine(), sys.platform)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return LIBRARIES / f"stet-{digest.hexdigest()[:16]}.so"


def compiler() -> str:
    """The C++ compiler: $CXX, or what is usually there. Raises BuildError."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("there is no C++ compiler: install g++ or clang++, or set CXX")


def build() -> Path:
    """Compile unless it is done already. Returns the library. Raises BuildError."""
    path = library_path()
    if path.is_file():
        return path
    cxx = compiler()
    sets: dict[str, tuple[str, ...]] = {"generic": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= X86_SETS
    LIBRARIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBRARIES) as scratch:
        units: list[tuple[str, str, tuple[str, ...]]] = [("stet", "stet.cpp", ())]
        for name, flags in sets.items():
            defines = (f"-DSTET_ISA={name}", f"-DSTET_{name.upper()}", f'-DSTET_NAME="{name}"')
            units.append((name, "isa.cpp", (*defines, *flags)))
        commands = [
            [cxx, *FLAGS, *QUIET, *flags, "-c", str(SOURCES / source), "-o", f"{scratch}/{name}.o"]
            for name, source, flags in units
        ]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        results = [(process.communicate()[1], process.returncode) for process in running]
        failed = [error for error, code in results if code != 0]
        if failed:
            raise BuildError(f"{cxx} failed: {next((e for e in failed[0].splitlines() if 'error' in e), failed[0])}")
        objects = [f"{scratch}/{name}.o" for name, _, _ in units]
        made = Path(scratch) / path.name
        link = subprocess.run(
            [cxx, "-shared", *objects, "-o", str(made), "-pthread"], stderr=subprocess.PIPE, text=True, check=False
        )
        if link.returncode != 0:
            raise BuildError(f"{cxx} failed to link: {link.stderr.strip().splitlines()[-1]}")
        for old in LIBRARIES.glob("stet-*.so"):
            old.unlink()
        made.replace(path)  # whole or not at all, whoever else is building
    return path


def main() -> int:
    """Build, and say where the library is or why there is none. Exit code 1 in that case."""
    try:
        print(build())
    except (BuildError, OSError) as error:
        print(f"the compiled CPU kernels cannot be built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

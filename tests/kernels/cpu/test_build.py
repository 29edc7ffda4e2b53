"""The library is found by its sources; without one there is a line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu import build
from kernels.cpu.native import LibraryMissing, Team, library
from kernels.portable import PortableOps
from server.engine.device import CpuDevice

ROOT = Path(__file__).resolve().parents[3]


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library_path()
    assert path.is_file()
    for source in build.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.library_path() == path
    (tmp_path / "tile.h").write_text("// changed")
    assert build.library_path() != path


def test_without_a_compiler_the_installer_says_so(tmp_path: Path) -> None:
    """Run alone, as an installer does: by its path, without the project's packages."""
    copy = tmp_path / "cpu"
    (copy / "csrc").mkdir(parents=True)
    for source in build.SOURCES.iterdir():
        (copy / "csrc" / source.name).write_bytes(source.read_bytes())
    (copy / "build.py").write_bytes(Path(build.__file__).read_bytes())
    result = subprocess.run(
        [sys.executable, "-I", str(copy / "build.py")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "the compiled CPU kernels cannot be built: there is no C++ compiler: install g++ or clang++, or set CXX"
    ]


def test_without_the_library_torch_computes_and_it_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kernels.cpu.native.library_path", lambda: Path("/nowhere/stet.so"))
    library.cache_clear()
    try:
        device = CpuDevice(torch.float32, 1)
    finally:
        library.cache_clear()
    assert isinstance(device.ops, PortableOps)
    assert device.ops.fallbacks["kernels"] == 1
    assert device.describe()["backend"] == "portable"
    assert "python -m kernels.cpu.build makes them" in caplog.text


def test_kernels_that_the_processor_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="'sse9'"):
        Team(1, "sse9")


def test_a_library_of_other_structures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cpu.native.Step", type("Other", (torch.nn.Module,), {}))
    monkeypatch.setattr("kernels.cpu.native.ctypes.sizeof", lambda each: 8)
    library.cache_clear()
    try:
        with pytest.raises(LibraryMissing, match="structures"):
            library()
    finally:
        monkeypatch.undo()
        library.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_may_end() -> None:
    """Its copy of a team has no threads to wait for."""
    code = (
        "import os; from kernels.cpu.native import Team; team = Team(2)\n"
        "child = os.fork()\n"
        "if child == 0:\n    del team\n    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "0", result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, to limit the memory of a process")
def test_threads_that_the_system_does_not_give_are_refused() -> None:
    """Some start and some do not; without an end those that did would take the process with them."""
    code = (
        "import resource; from kernels.cpu.native import Team; from pathlib import Path\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20),) * 2)\n"
        "try:\n    Team(150)\nexcept ValueError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("threads is 150; the system"), result.stderr

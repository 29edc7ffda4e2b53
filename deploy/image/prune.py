"""Takes out of a virtual environment what a server never loads: `prune.py ENVIRONMENT`.

Tests and C++ headers of libraries, and PyTorch's test programs. What is imported by name stays (torch.testing, for one,
is imported by torch itself); the image's build runs the project afterwards.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_TORCH = ("test", "include", "share/cmake")
_TORCH_PROGRAMS = ("bin/test_*", "bin/protoc*", "bin/*_test")
_WITH_TESTS = ("numpy", "sympy", "networkx", "mpmath")


def superfluous(site_packages: Path) -> Iterator[Path]:
    """Folders and files to remove."""
    torch = site_packages / "torch"
    yield from (torch / name for name in _TORCH)
    yield from (path for pattern in _TORCH_PROGRAMS for path in torch.glob(pattern))
    for name in _WITH_TESTS:
        yield from (site_packages / name).rglob("tests")


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.lstat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def main(environment: Path) -> int:
    """Prune, and say how much it was."""
    (site_packages,) = environment.glob("lib/python3*/site-packages")
    freed = 0
    for path in list(superfluous(site_packages)):
        if not path.exists():
            continue
        freed += size(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    print(f"pruned {freed / 1e6:.0f} MB of {site_packages}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

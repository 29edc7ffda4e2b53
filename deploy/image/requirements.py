"""Prints what pyproject.toml asks for, one requirement a line: `requirements.py [EXTRA,EXTRA…]…`.

"" stands for the project's own dependencies. So an image can install them before the project's sources are there.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """The requirements of the project ("") and of its extras. Raises KeyError for an extra that does not exist."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {"": project["dependencies"], **project["optional-dependencies"]}
    return [requirement for extra in extras for requirement in known[extra]]


if __name__ == "__main__":
    wanted = [sys.argv[1], *(name for names in sys.argv[2:] for name in names.split(",") if name)]
    print("\n".join(requirements(wanted)))

"""Compiles the CPU kernels when the project is installed. Without a compiler it installs all the same, and says so."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):  # type: ignore[misc]
    """Hatchling's way to run `build.py` before it packs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library. Its absence costs speed only (`kernels.portable`), so it stops nothing."""
        module = runpy.run_path(str(Path(self.root) / "kernels" / "cpu" / "build.py"))
        try:
            library = module["build"]()
        except (module["BuildError"], OSError) as error:
            self.app.display_warning(f"the compiled CPU kernels cannot be built, so the CPU will be slow: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(str(Path(library).relative_to(self.root)))

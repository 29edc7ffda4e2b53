"""Imports run one way. Read from the sources, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "models", "server")

# The scheduler and its parts: a function of the calls so far, and of nothing else.
PURE_NAMES = ("admission", "block_pool", "books", "fair_queue", "scheduler", "step_budget", "step_shares")
PURE = (
    *(f"server.engine.{name}" for name in PURE_NAMES),
    *(f"server.engine.{n}" for n in ("config", "plan", "request", "scores")),
)

# What crosses the boundary between the processes.
ENGINE_WORDS = (
    "server.engine.messages",
    "server.engine.request",
    "server.engine.config",
    "server.engine.scores",
)

# Who may import whom: the longest matching prefix on the left decides; itself and what stands on the right is allowed.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels",),
    "models": ("models", "kernels"),
    "server.version": (),
    "server.logs": (),
    "server.generation": ("server.engine.request", "server.engine.scores"),
    "server.metrics": ("server.engine.messages",),
    "server.engine": ("server.engine", "server.version", "models", "kernels"),
    "server.engine.process": ("server.engine", "server.logs"),
    "server.engine.request": (),
    "server.engine.config": (),
    "server.engine.identity": (),
    "server.engine.scores": (),
    "server.engine.grammar_limits": (),
    "server.engine.plan": ("server.engine.request", "server.engine.scores"),
    "server.engine.messages": (
        "server.engine.request",
        "server.engine.scores",
        "server.engine.config",
        "server.engine.identity",
    ),
    **{f"server.engine.{name}": PURE for name in PURE_NAMES},
    "server.keys": (),
    "server.rates": (),
    "server.units": (),
    "server.places": ("server.rates", "server.generation"),
    "server.keys_command": ("server.config", "server.keys"),
    "server.planner": (
        "server.planner",
        "server.engine.memory",
        "server.engine.config",
        "server.config",
        "server.units",
        "server.version",
        "models",
        "kernels.sizes",
    ),
    # The only part that touches the device: a process of its own.
    "server.planner.probe": ("server.planner", "server.engine", "models", "kernels"),
    # It measures a server from outside, this one or another.
    "server.bench": ("server.bench", "server.config", "server.progress", "server.version"),
    # Shared with load tests that run where only locust is installed.
    **{f"server.bench.{name}": ("server.bench.wire",) for name in ("wire", "dialect", "workload", "host")},
    "server.text": ("server.text", "server.generation", "server.engine.grammar_limits"),
    "server.watchdog": ("server.engine.messages",),
    "server.supervisor": ("server.engine.messages", "server.engine.config", "server.metrics", "server.watchdog"),
    "server.client": (
        "server.supervisor",
        *ENGINE_WORDS,
        "server.metrics",
    ),
    "server.details": ("server.client", "server.text", "server.generation", *ENGINE_WORDS),
    "server.job": (
        "server.details",
        "server.client",
        "server.text",
        "server.metrics",
        "server.generation",
        *ENGINE_WORDS,
    ),
    "server.speech": ("server.text", "server.generation"),
    "server.preparation": ("server.speech", "server.text", "server.generation", *ENGINE_WORDS),
    "server.together": ("server.preparation", "server.generation", "server.engine.request"),
    "server.served": ("server.preparation", "server.supervisor", "server.text", *ENGINE_WORDS),
    "server.service": (
        "server.preparation",
        "server.served",
        "server.together",
        "server.job",
        "server.places",
        "server.client",
        "server.supervisor",
        "server.metrics",
        "server.generation",
        "server.version",
        "server.tracing",
        *ENGINE_WORDS,
    ),
    # Imported by the command line alone, and only where traces are asked for; the service knows its type.
    "server.tracing": (
        "server.job",
        "server.client",
        "server.metrics",
        "server.generation",
        "server.version",
        *ENGINE_WORDS,
    ),
    "server.http": (
        "server.http",
        "server.keys",
        "server.rates",
        "server.service",
        "server.planner",
        "server.generation",
        "server.metrics",
        "server.logs",
        "server.version",
        "server.engine.request",
        "server.engine.scores",
        "server.engine.config",
        "server.engine.memory",
    ),
    "server.config": ("server.engine.config", "server.version"),
    "server.progress": (),
    "server.quantize": ("server.engine", "server.progress", "models", "kernels"),
    "server.evaluate": ("server.config", "server.engine", "server.progress", "server.version", "models", "kernels"),
    "server.announcement": (
        "server.service",
        "server.supervisor",
        "server.units",
        "server.version",
        "server.engine.messages",
    ),
    "server.serve_command": (
        "server.announcement",
        "server.config",
        "server.keys",
        "server.http",
        "server.service",
        "server.supervisor",
        "server.metrics",
        "server.logs",
        "server.tracing",
    ),
    "server.cli": (
        "server.config",
        "server.keys_command",
        "server.bench",
        "server.evaluate",
        "server.quantize",
        "server.planner",
        "server.serve_command",
        "server.supervisor",
        "server.version",
    ),
}

# What must not reach which modules, whatever else they import.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **{f"server.engine.{name}": ("torch", "time", "asyncio", "random", "datetime", "numpy") for name in PURE_NAMES},
    "kernels": ("transformers", "fastapi", "pydantic", "msgspec"),
    "models": ("transformers", "fastapi", "pydantic", "msgspec"),
    "server": ("transformers", "pickle", "multiprocessing"),
}
WEB = ("fastapi", "starlette", "pydantic", "uvicorn")
WEB_ALLOWED = ("server.http", "server.config")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


class WithoutTypes(ast.NodeTransformer):
    """Drops `if TYPE_CHECKING:` blocks, which never run."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports_of(path: Path, *, types: bool = True) -> set[str]:
    """Absolute names imported anywhere in a file; `from package import module` counts as the module."""
    found: set[str] = set()
    tree: ast.AST = ast.parse(path.read_text())
    for node in ast.walk(tree if types else WithoutTypes().visit(tree)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}
RUN_TIME_IMPORTS = {name: imports_of(path, types=False) for name, path in MODULES.items()}


def ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_arrows(module: str) -> None:
    rules = [prefix for prefix in ALLOWED if under(module, prefix)]
    if module in PACKAGES:
        assert not IMPORTS[module], "a package's __init__ imports nothing"
        return
    assert rules, f"{module} has no rule: say in ALLOWED what it may import"
    allowed = ALLOWED[max(rules, key=len)]
    for imported in sorted(filter(ours, IMPORTS[module])):
        assert imported == module or any(under(imported, prefix) for prefix in allowed), f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_forbidden_package(module: str) -> None:
    banned = {package for prefix, packages in FORBIDDEN.items() if under(module, prefix) for package in packages}
    if not any(under(module, prefix) for prefix in WEB_ALLOWED):
        banned.update(WEB)
    assert not banned & {name.split(".")[0] for name in IMPORTS[module]}


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for imported in sorted(filter(MODULES.__contains__, RUN_TIME_IMPORTS[module])):
            if imported != module:
                visit(imported, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_http_process_never_imports_torch() -> None:
    code = (
        "import sys, server.serve_command, server.http.app, server.service\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_the_engine_needs_no_web_package() -> None:
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'pydantic', 'uvicorn', 'msgspec'): sys.modules[name] = None\n"
        "import server.engine.build; print('ok')"
    )
    assert run_python(code) == "ok"


def test_the_kernels_package_imports_nothing() -> None:
    assert run_python("import sys, kernels; print('torch' in sys.modules, kernels.__version__)") == "False 0"

"""What no code here may do, read from the sources: unpickle, run code that it was given, call out, or tell its inside.

`tests/end_to_end/test_audit.py` looks at the same from the other side: at what the running processes do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for package in ("kernels", "models", "server")
    for path in (ROOT / package).rglob("*.py")
}
# Makes the embedded model, by hand; nothing that serves imports it (a test below).
TRAINING = "models/training/"

UNPICKLERS = frozenset("pickle cPickle dill cloudpickle joblib marshal shelve multiprocessing".split())
# Whoever may open a connection: downloads at the start, the socket to serve on, and the pair between the processes.
NETWORK = frozenset("socket ssl http urllib httpx requests aiohttp huggingface_hub ftplib smtplib xmlrpc".split())
MAY_USE_THE_NETWORK = {
    "models/hub.py",
    "server/serve_command.py",
    "server/supervisor.py",
    "server/engine/process.py",
    "server/http/serving.py",  # the type of a socket that is open already
    "server/bench/client.py",  # the command that measures a server: the server never imports it
    "server/tracing.py",  # takes an address apart; to the operator's collector, where one is named
}
CONNECTING = frozenset(
    "open_connection open_unix_connection create_connection sock_connect connect connect_ex getaddrinfo gethostbyname "
    "urlopen snapshot_download hf_hub_download".split()
)
MAY_START_PROCESSES = {"server/supervisor.py", "server/planner/device.py"}

# Their messages are written here, for a person: they may be passed on. Any other exception's words are not ours.
# HttpParserUpgrade holds a number: where the parser has stopped.
OWN_ERRORS = frozenset(
    "HttpError Refusal PlanError TemplateError ModelError KeysError ConfigError _Raised _Refused "
    "HttpParserUpgrade".split()
)
ANSWERS = (
    "server/http/",
    *(f"server/{name}.py" for name in ("service", "job", "client", "generation", "text/template")),
    *(f"server/planner/{name}.py" for name in ("plan", "subject", "device")),
)


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def calls(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call by the name that is written: `torch.load`, `open`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def unpickling(name: str, module: ast.Module) -> list[str]:
    found = [text for text in imported(module) if text.split(".")[0] in UNPICKLERS and not name.startswith(TRAINING)]
    for text, call in calls(module):
        last = text.rsplit(".", 1)[-1]
        if text in ("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"):
            # Its own checkpoints, and even those without objects.
            if not (name.startswith(TRAINING) and text == "torch.load" and keyword(call, "weights_only") == "True"):
                found.append(text)
        elif text in ("np.load", "numpy.load"):
            if keyword(call, "allow_pickle") not in (None, "False"):
                found.append(text)
        elif last in ("read_pickle", "Unpickler") or (last == "load" and text.startswith("yaml.")):
            found.append(text)
    return found


def running_code(name: str, module: ast.Module) -> list[str]:
    found = [
        text
        for text, call in calls(module)
        if text in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
    ]
    for node in ast.walk(module):
        words = [node.arg] if isinstance(node, ast.keyword) else []
        words += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        words += [node.id] if isinstance(node, ast.Name) else []
        found += [word for word in words if word and word.strip() == "trust_remote_code"]
    for text, call in calls(module):
        if keyword(call, "shell") not in (None, "False"):
            found.append(f"{text}(shell=…)")
        last = text.rsplit(".", 1)[-1]
        starts = text.startswith("subprocess.") and last in ("Popen", "run", "check_output", "check_call")
        if starts and name not in MAY_START_PROCESSES and not name.startswith(("kernels/", TRAINING)):
            found.append(text)
        if (last == "from_string" or text in ("jinja2.Template", "Template")) and name != "server/text/template.py":
            found.append(text)
    return found


def calling_out(name: str, module: ast.Module) -> list[str]:
    if name in MAY_USE_THE_NETWORK or name.startswith(("models/training/", "kernels/bench/")):
        return []
    found = [text for text in imported(module) if text.split(".")[0] in NETWORK]
    return found + [text for text, _ in calls(module) if text.rsplit(".", 1)[-1] in CONNECTING]


def telling(name: str, module: ast.Module) -> list[str]:
    """Places where the words of an exception that is not ours become text."""
    found: list[str] = []
    for handler in ast.walk(module):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None or handler.type is None:
            continue
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if all(ast.unparse(kind).rsplit(".", 1)[-1] in OWN_ERRORS for kind in kinds):
            continue
        for node in ast.walk(handler):
            text = None
            if isinstance(node, ast.FormattedValue):
                text = node.value
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("str", "repr", "format", "_one_line"):
                text = node.args[0] if node.args else None
            elif isinstance(node, ast.Attribute) and node.attr in ("args", "__cause__", "__context__", "__traceback__"):
                text = node.value
            if isinstance(text, ast.Name) and text.id == handler.name:
                found.append(f"line {node.lineno}: {ast.unparse(handler.type)}")
    return found


@pytest.mark.parametrize("rule", [unpickling, running_code, calling_out])
def test_no_code_here_does_it(rule: object) -> None:
    assert callable(rule)
    found = {name: hits for name in FILES if (hits := rule(name, tree(name)))}
    assert found == {}


def test_no_answer_tells_the_words_of_a_foreign_exception() -> None:
    names = [name for name in FILES if name.startswith(ANSWERS)]
    assert len(names) > 20
    found = {name: hits for name in names if (hits := telling(name, tree(name)))}
    # These go to the operator alone: why a start has failed, which no route shows.
    starting = ("ModelTextError", "jinja2.TemplateError")
    rest = {name: [hit for hit in hits if not hit.endswith(starting)] for name, hits in found.items()}
    assert {name: hits for name, hits in rest.items() if hits} == {}


def test_nothing_that_serves_reaches_the_training() -> None:
    for name in FILES:
        # `stet evaluate` reads the texts and tasks that the embedded model was held to.
        if not name.startswith(TRAINING) and name != "models/evaluate.py":
            assert not [text for text in imported(tree(name)) if text.startswith("models.training")], name


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (unpickling, "import pickle"),
        (unpickling, "def f():\n from multiprocessing import Pool"),
        (unpickling, "torch.load(path)"),
        (unpickling, "torch.load(path, weights_only=True)"),
        (unpickling, "np.load(path, allow_pickle=True)"),
        (unpickling, "yaml.load(text)"),
        (running_code, "eval(text)"),
        (running_code, "f(trust_remote_code=True)"),
        (running_code, "options['trust_remote_code'] = 1"),
        (running_code, "subprocess.run(command, shell=True)"),
        (running_code, "subprocess.Popen(command)"),
        (running_code, "environment.from_string(request.chat_template)"),
        (calling_out, "import httpx"),
        (calling_out, "await asyncio.open_connection(host, 80)"),
        (calling_out, "loop.getaddrinfo(host, 80)"),
        (telling, "try:\n f()\nexcept Exception as e:\n raise HttpError('x', [Problem(None, str(e))])"),
        (telling, "try:\n f()\nexcept (HttpError, OSError) as e:\n text = f'failed: {e}'"),
        (telling, "try:\n f()\nexcept ValueError as e:\n g(e.args)"),
    ],
)
def test_the_rules_see_what_they_forbid(rule: object, code: str) -> None:
    assert callable(rule)
    assert rule("server/http/app.py", ast.parse(code))

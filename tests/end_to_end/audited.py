"""`stet serve` with an audit hook in both of its processes: what either of them does is written to a file each.

    python -m tests.end_to_end.audited FOLDER serve …      the HTTP process
    python -m tests.end_to_end.audited FOLDER engine FD    the engine process, which the first one starts

One line an event: its name and its arguments. See https://docs.python.org/3/library/audit_events.html.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

WATCHED = (
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.putenv", "ctypes.dlopen"),
    *("pickle.find_class", "marshal.loads", "code.__new__", "exec", "compile", "import"),
    *("open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "shutil.rmtree"),
)


def install(path: Path) -> None:
    """Write every watched event of this process to a file from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    watched = frozenset(WATCHED)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in watched:
            shown = " ".join(repr(argument)[:300] for argument in arguments[:3])
            os.write(descriptor, f"{event} {shown}\n".encode("utf-8", "replace"))

    sys.addaudithook(hook)
    freeze = gc.freeze

    def frozen() -> None:
        freeze()
        os.write(descriptor, f"gc.freeze {gc.get_freeze_count()}\n".encode())

    gc.freeze = frozen  # no event tells of it


def main() -> None:
    folder, role, *rest = sys.argv[1:]
    install(Path(folder) / role)
    if role == "engine":
        from server.engine.process import main as run_engine

        sys.exit(run_engine(int(rest[0])))
    from server.cli import main as run_cli

    engine = [sys.executable, "-m", "tests.end_to_end.audited", folder, "engine"]
    sys.exit(run_cli(["serve", *rest], engine_command=engine))


if __name__ == "__main__":
    main()

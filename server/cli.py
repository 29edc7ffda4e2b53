"""The command line: `stet serve [MODEL]` and `stet version`.

The order of a start is what makes it short: read the flags, take the port, start the engine process, and only then
import the web stack, while the engine imports torch.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from server.config import ConfigError, OneLineParser, Settings, add_flags, check_exposure, resolve
from server.supervisor import EngineFailed, EngineProcess, Limits, Supervisor, spawn_engine
from server.version import VERSION

if TYPE_CHECKING:
    from server.engine.messages import Ready
    from server.service import Service

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
_BACKLOG = 2048
_PROGRESS_SECONDS = 0.1


def main(arguments: Sequence[str] | None = None, *, engine_command: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for what the caller can repair.

    engine_command: another engine than this project's, for tests and measurements; see supervisor.spawn_engine.
    """
    began = time.monotonic()
    parser = OneLineParser(prog="stet", description="An inference server whose tokens stand.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. A flag wins over its variable, a variable over the default.",
        allow_abbrev=False,
    )
    add_flags(serve)
    commands.add_parser("version", help="print the version", allow_abbrev=False)
    flags = parser.parse_args(arguments)
    if flags.command == "version":
        print(f"stet {VERSION}")
        return EXIT_OK
    return _serve(flags, engine_command, began)


def _serve(flags: argparse.Namespace, command: Sequence[str] | None, began: float) -> int:
    process: EngineProcess | None = None
    try:
        settings = resolve(vars(flags), os.environ)
        sock = open_socket(settings)
        _stop_early_on_signals()
        process = spawn_engine(settings.engine_config(), command)
        return _run(settings, command, sock, process, began)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except EngineFailed as error:
        return _fail(str(error), EXIT_USAGE if error.usage else EXIT_FAILED)
    except OSError as error:
        return _fail(f"the engine process cannot be started: {error.strerror or error}", EXIT_FAILED)
    finally:
        if process is not None:
            process.kill()


def _stop_early_on_signals() -> None:
    """Until the event loop takes the signals over there is nothing to drain: end quietly, wherever that is."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(EXIT_OK)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _fail(message: str, code: int) -> int:
    print(f"stet: {message}", file=sys.stderr)
    return code


def open_socket(settings: Settings) -> socket.socket:
    """A listening socket for the settings' host and port. Raises ConfigError with one line for a person.

    It listens at once, so that a second server on the same port fails here and not after its model has been loaded.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host}: there is no such address") from None
    check_exposure(settings, [str(address[0]) for *_, address in found])
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"{host} port {port}: {reason.lower()}; choose another with --port") from None
    return sock


def _run(
    settings: Settings, command: Sequence[str] | None, sock: socket.socket, process: EngineProcess, began: float
) -> int:
    """Import what serves, on the event loop that serves."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(_serve_until_stopped(settings, command, sock, process, began))


async def _serve_until_stopped(
    settings: Settings, command: Sequence[str] | None, sock: socket.socket, process: EngineProcess, began: float
) -> int:
    from server.http.app import create_app
    from server.http.serving import HttpServer
    from server.logs import configure_logging
    from server.metrics import Metrics
    from server.service import Service, ServiceSettings

    as_text = (settings.log_format or ("text" if sys.stderr.isatty() else "json")) == "text"
    configure_logging("text" if as_text else "json")
    metrics = Metrics()
    limits = Limits(crashes=settings.max_crashes_per_minute)
    supervisor = Supervisor(settings.engine_config(), metrics, command=command, first=process, limits=limits)
    service = Service(supervisor, metrics, ServiceSettings(max_waiting=settings.max_waiting))
    server = HttpServer(create_app(service, metrics), metrics, sock)

    stop = asyncio.Event()
    _take_signals(stop, process)
    await service.start()
    serving = await server.start()
    starting = asyncio.create_task(_announce(sock, service, supervisor, began, as_text))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        await service.drain(settings.drain_timeout)
    finally:
        starting.cancel()
        stopping.cancel()
        await server.stop()
        await service.stop()
    return EXIT_OK


def _take_signals(stop: asyncio.Event, process: EngineProcess) -> None:
    """The first SIGTERM or SIGINT asks for a drain, the second ends everything at once."""

    def on_signal(number: int) -> None:
        if stop.is_set():
            _end_now(number)
        stop.set()

    def _end_now(number: int) -> NoReturn:
        # The engine ends by itself when its socket does.
        os._exit(128 + number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


async def _announce(sock: socket.socket, service: Service, supervisor: Supervisor, began: float, as_text: bool) -> None:
    """Show how the start goes, and what is served once it is. Raises EngineFailed."""
    import logging

    show = asyncio.create_task(_show_progress(supervisor)) if sys.stderr.isatty() else None
    try:
        await service.ready()
        ready = await supervisor.wait_ready()
    finally:
        if show is not None:
            show.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    seconds = time.monotonic() - began
    if as_text:
        print(summary(ready, url, seconds), file=sys.stderr, flush=True)
    fields = {"url": url, "model": ready.identity.model, "startup_seconds": round(seconds, 3)}
    logging.getLogger("stet").info("ready", extra={"fields": fields})


async def _show_progress(supervisor: Supervisor) -> None:
    """One line on the terminal, rewritten: the phase, what it does, and how far it is."""
    shown = ""
    while True:
        progress = supervisor.progress
        if progress is None:
            line = "starting the engine"
        else:
            share = "" if progress.fraction is None else f" {progress.fraction:4.0%}"
            line = f"{progress.phase}: {progress.message}{share}"
        if line != shown:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            shown = line
        await asyncio.sleep(_PROGRESS_SECONDS)


def summary(ready: Ready, url: str, seconds: float) -> str:
    """What is served and how to try it, for a person."""
    identity = ready.identity
    phases = ", ".join(f"{name} {value:.1f}" for name, value in ready.startup_seconds.items())
    memory = ", ".join(f"{kind.replace('_', ' ')} {_size(size)}" for kind, size in ready.memory_bytes.items() if size)
    tokens = ready.num_blocks * ready.block_size
    instructions = f" ({identity.instruction_set})" if identity.instruction_set else ""
    rows = {
        "model": f"{identity.model} ({identity.architecture}, {_count(identity.num_parameters)} parameters)",
        "dtype": f"{identity.dtype}, KV cache {identity.kv_cache_dtype}",
        "quantization": identity.quantization,
        "device": f"{identity.device}{instructions}, {identity.threads} threads",
        "context": f"{ready.max_model_len:,} tokens, up to {ready.max_running} requests at once",
        "KV cache": f"{ready.num_blocks:,} blocks of {ready.block_size} tokens ({tokens:,} tokens)",
        "memory": memory,
        "started in": f"{seconds:.1f} s ({phases})",
    }
    lines = [f"Stet {VERSION} serves {identity.model} on {url}", ""]
    lines += [f"  {name:<14}{value}" for name, value in rows.items()]
    lines += [
        "",
        "Try it:",
        f"  curl {url}/generate -H 'Content-Type: application/json' \\",
        """    -d '{"prompt": "Once upon a time", "max_new_tokens": 60}'""",
        "",
    ]
    return "\n".join(lines)


def _size(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _count(number: int) -> str:
    for unit, factor in (("billion", 10**9), ("million", 10**6)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:,}"


if __name__ == "__main__":
    sys.exit(main())

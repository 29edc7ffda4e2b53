"""`stet serve`: from settings to a server that runs until it is told to stop.

The order of a start is what makes it short: take the port, start the engine process, and only then import the web
stack, while the engine imports torch. So what is imported at the top is what is needed until then.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING

from server.config import ConfigError, check_exposure
from server.supervisor import EngineFailed, Limits, Supervisor, spawn_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.config import Settings
    from server.supervisor import EngineProcess

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 2048
_MAX_SOCKETS = 65536


def serve(settings: Settings, command: Sequence[str] | None, began: float) -> None:
    """Serve until a signal asks for an end. Raises ConfigError, EngineFailed: each has one line for a person.

    command: of another engine than this project's, see supervisor.spawn_engine. began: when the start did, monotonic.
    """
    _allow_connections()
    _check_keys(settings)
    _check_tracing(settings)
    sock = _open_socket(settings)
    try:
        process = spawn_engine(settings.engine_config(), command)
    except OSError as error:
        raise EngineFailed(f"the engine process cannot be started: {error.strerror or error}", usage=False) from None
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_until_stopped(settings, command, sock, process, began))
    finally:
        process.kill()


def _allow_connections() -> None:
    """As many open sockets as this process may have: the soft limit of many systems, 1024, is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_SOCKETS if hard == resource.RLIM_INFINITY else min(hard, _MAX_SOCKETS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_keys(settings: Settings) -> None:
    """Refuse a file of API keys that cannot be used, before anything is started. Raises ConfigError."""
    if settings.api_keys is None:
        return

    from pathlib import Path

    from server.keys import KeysError, parse_keys, read_keys

    try:
        parse_keys(read_keys(Path(settings.api_keys)))
    except KeysError as error:
        raise ConfigError(f"--api-keys {settings.api_keys}: {error}") from None


def _check_tracing(settings: Settings) -> None:
    """Refuse to trace without what it needs, before anything is started. Raises ConfigError."""
    if settings.otlp_endpoint is None:
        return

    import importlib.util

    wanted = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    try:
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:  # a package above it
        missing = [str(error.name)]
    if missing:
        raise ConfigError(f"--otlp-endpoint needs {missing[0]}, which is not installed: install Stet with [tracing]")


def _open_socket(settings: Settings) -> socket.socket:
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


def _url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _serve_until_stopped(
    settings: Settings, command: Sequence[str] | None, sock: socket.socket, process: EngineProcess, began: float
) -> None:
    """Build what serves, serve, and take it down again in the reverse order."""
    from pathlib import Path

    from server.announcement import announce
    from server.http.app import create_app
    from server.http.auth import KeyRing
    from server.http.serving import HttpServer
    from server.keys import KeysError
    from server.logs import configure_logging
    from server.metrics import Metrics
    from server.service import Service, ServiceSettings

    configure_logging(settings.resolved_log_format)
    as_text = settings.resolved_log_format == "text"
    metrics = Metrics()
    limits = Limits(crashes=settings.max_crashes_per_minute)
    supervisor = Supervisor(settings.engine_config(), metrics, command=command, first=process, limits=limits)
    try:
        keys = None if settings.api_keys is None else KeyRing(Path(settings.api_keys), metrics)
    except KeysError as error:  # it has changed since it was checked
        raise ConfigError(f"--api-keys {settings.api_keys}: {error}") from None
    spent = (lambda tenant, tokens: None) if keys is None else keys.spend
    tracer = None
    if settings.otlp_endpoint is not None:
        # Here, because it takes a third of a second, and most servers do without.
        from server.tracing import Tracer

        tracer = Tracer(settings.otlp_endpoint)
    service_settings = ServiceSettings(max_waiting=settings.max_waiting, default_deadline_ms=settings.deadline_ms)
    service = Service(supervisor, metrics, service_settings, spent=spent, tracer=tracer)
    server = HttpServer(create_app(service, metrics, keys=keys, documented=settings.docs), metrics, sock)

    stop = asyncio.Event()
    _take_signals(stop)
    await service.start()
    serving = await server.start()
    watching = None if keys is None else asyncio.create_task(keys.watch(), name="api-keys")
    starting = asyncio.create_task(announce(_url_of(sock), service, supervisor, began, as_text, keys is not None))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What was loaded lives as long as the process. Looking at all of it, which a full collection did every few
            # hundred requests, held up every stream and probe for 55 ms.
            gc.collect()
            gc.freeze()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        await service.drain(settings.drain_timeout)
    finally:
        for task in (starting, stopping, watching):
            if task is not None:
                task.cancel()
        await server.stop()
        await service.stop()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


def _take_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT asks for a drain, the second ends everything at once."""

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)

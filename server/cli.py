"""The command line: `stet serve [MODEL]`, `stet bench URL`, `stet quantize MODEL OUT`, `stet evaluate [MODEL]` …

The order of a start is what makes it short: read the flags, take the port, start the engine process, and only then
import the web stack, while the engine imports torch.
"""

from __future__ import annotations

# Only what is loaded anyway: a Ctrl-C while the rest is imported must not end in a traceback.
import gc
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    import asyncio
    import socket
    from collections.abc import Sequence

    from server.config import Settings
    from server.engine.messages import Ready
    from server.service import Service
    from server.supervisor import EngineProcess, Supervisor

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 2048
_MAX_SOCKETS = 65536
_PROGRESS_SECONDS = 0.1
_PROGRESS_LOG_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None, *, engine_command: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for what the caller can repair.

    engine_command: another engine than this project's, for tests and measurements; see supervisor.spawn_engine.
    """
    began = time.monotonic()
    before = {number: signal.signal(number, _end_quietly) for number in _SIGNALS}
    try:
        flags = _parse(arguments)
        if flags.command == "version":
            from server.version import VERSION

            print(f"stet {VERSION}")
            return EXIT_OK
        if flags.command == "keys":
            from server.keys_command import run as run_keys

            return run_keys(flags)
        if flags.command == "plan":
            return _plan(flags)
        if flags.command == "bench":
            return _bench(flags)
        if flags.command == "evaluate":
            return _evaluate(flags)
        if flags.command == "quantize":
            # Here, because it imports torch.
            from server.quantize import run

            return run(flags)
        return _serve(flags, engine_command, began)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_quietly(number: int, frame: object) -> NoReturn:
    """Until the event loop takes the signals over there is nothing to drain, and the engine ends when its socket does.

    Nothing is raised: an exception in the middle of the import of an extension module can crash the interpreter.
    """
    os._exit(EXIT_OK)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from server.config import OneLineParser, add_flags

    parser = OneLineParser(prog="stet", description="An inference server whose tokens stand.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. A flag wins over its variable, a variable over the default.",
        allow_abbrev=False,
    )
    add_flags(serve)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure what a quantization costs",
        description="Measure a model as it would be served against the same model unquantized: perplexity, divergence, "
        "agreement, error per layer; write it as a receipt into the model's folder, where /info finds it.",
        allow_abbrev=False,
    )
    _add_evaluate_flags(evaluate)
    quantize = commands.add_parser(
        "quantize",
        help="write an int8 checkpoint",
        description="Write a model's weights as int8 into a new folder, half as large and the same model as when it is "
        "quantized while it loads; tokenizer and all else that belongs to it are copied. The format is that of "
        "compressed-tensors. It is served by the folder's path alone.",
        allow_abbrev=False,
    )
    _add_quantize_flags(quantize)
    plan = commands.add_parser(
        "plan",
        help="say whether a model fits and how fast it will be",
        description="Say what a model needs and how fast it will be, from its configuration alone: bytes of weights "
        "and KV cache, the longest context and the most sequences that fit, predicted speed for every quantization, "
        "and what training it would take. The first plan measures this machine, which takes some seconds.",
        allow_abbrev=False,
    )
    given = sys.argv[1:] if arguments is None else arguments
    if "plan" in given[:1]:  # what it imports would only hold up the others
        from server.planner.command import add_flags as add_plan_flags

        add_plan_flags(plan)
    bench = commands.add_parser(
        "bench",
        help="measure a running server",
        description="Measure a running server, this one or any with OpenAI's API, as its users meet it: time to first "
        "token, inter-token time, throughput and goodput, each from the moment at which a request was due.",
        allow_abbrev=False,
    )
    if "bench" in given[:1]:
        from server.bench.command import add_flags as add_bench_flags

        add_bench_flags(bench)
    keys = commands.add_parser(
        "keys",
        help="make and list API keys",
        description="Make and list API keys. A key is revoked by deleting its entry from the file.",
        allow_abbrev=False,
    )
    if "keys" in given[:1]:
        from server.keys_command import add_flags as add_keys_flags

        add_keys_flags(keys)
    commands.add_parser("version", help="print the version", allow_abbrev=False)
    return parser.parse_args(arguments)


def _add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    from server.config import add_flags

    names = ("model", "revision", "offline", "device", "dtype", "quantization", "kv_cache_dtype", "threads")
    add_flags(parser, names)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what to read (default: held-out text of the embedded model)"
    )
    parser.add_argument(
        "--against", metavar="MODEL", help="the unquantized model (default: MODEL itself, loaded unquantized)"
    )
    parser.add_argument(
        "--max-tokens",
        type=_count_of,
        default=100_000,
        metavar="COUNT",
        help="tokens of the text at most (%(default)s)",
    )
    parser.add_argument(
        "--tasks",
        type=_count_of,
        default=100,
        metavar="COUNT",
        help="tasks of the embedded model for each kind and number of examples (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        choices=("table", "head", "both"),
        help="leave the token table, the head or both unquantized, to see what theirs costs; writes no receipt",
    )
    parser.add_argument("--json", action="store_true", help="print the receipt instead of a table")


def _add_quantize_flags(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub name, or the embedded model")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must be new or empty")
    parser.add_argument(
        "--mode",
        choices=("w8a8", "w8a16"),
        default="w8a8",
        help="what the checkpoint is for, unless stet serve is told otherwise; the weights are the same "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        choices=("table", "head", "both"),
        help="leave the token table, the head or both unquantized; other servers take few checkpoints without it "
        "(default: neither)",
    )
    parser.add_argument(
        "--smooth",
        type=Path,
        metavar="FILE",
        help="a text like those that will be served: move outliers of its activations into the weights first "
        "(SmoothQuant), which can help w8a8",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a Hub model (default: the main one)"
    )
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine; download nothing")


def _count_of(text: str) -> int:
    import argparse

    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 999999999")
    return int(text)


def _plan(flags: argparse.Namespace) -> int:
    from server.planner.command import run

    for number in _SIGNALS:  # there is nothing to drain, and a plan that was cut off has not succeeded
        signal.signal(number, signal.SIG_DFL)
    return run(flags)


def _bench(flags: argparse.Namespace) -> int:
    from server.bench.command import run

    for number in _SIGNALS:  # there is nothing to drain, and a measurement that was cut off has not succeeded
        signal.signal(number, signal.SIG_DFL)
    return run(flags)


def _evaluate(flags: argparse.Namespace) -> int:
    from server.config import ConfigError, resolve

    try:
        settings = resolve(vars(flags), os.environ)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    for number in _SIGNALS:  # there is nothing to drain, and a measurement that was cut off has not succeeded
        signal.signal(number, signal.SIG_DFL)
    # Here, because it imports torch.
    from server.evaluate import Measurement, run

    measurement = Measurement(flags.text, flags.max_tokens, flags.tasks, flags.against, flags.keep)
    return run(settings, measurement, flags.json)


def _serve(flags: argparse.Namespace, command: Sequence[str] | None, began: float) -> int:
    from server.config import ConfigError, resolve
    from server.supervisor import EngineFailed, spawn_engine

    process: EngineProcess | None = None
    _allow_connections()
    try:
        settings = resolve(vars(flags), os.environ)
        _check_keys(settings)
        _check_tracing(settings)
        sock = open_socket(settings)
        try:
            process = spawn_engine(settings.engine_config(), command)
        except OSError as error:
            return _fail(f"the engine process cannot be started: {error.strerror or error}", EXIT_FAILED)
        return _run(settings, command, sock, process, began)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except EngineFailed as error:
        return _fail(str(error), EXIT_USAGE if error.usage else EXIT_FAILED)
    finally:
        if process is not None:
            process.kill()


def _allow_connections() -> None:
    """As many open sockets as this process may have: the soft limit of many systems, 1024, is soon reached."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_SOCKETS if hard == resource.RLIM_INFINITY else min(hard, _MAX_SOCKETS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_keys(settings: Settings) -> None:
    """Refuse a file of API keys that cannot be used, before anything is started. Raises ConfigError."""
    if settings.api_keys is None:
        return
    from pathlib import Path

    from server.config import ConfigError
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

    from server.config import ConfigError

    wanted = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    try:
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:  # a package above it
        missing = [str(error.name)]
    if missing:
        raise ConfigError(f"--otlp-endpoint needs {missing[0]}, which is not installed: install Stet with [tracing]")


def _fail(message: str, code: int) -> int:
    print(f"stet: {message}", file=sys.stderr)
    return code


def open_socket(settings: Settings) -> socket.socket:
    """A listening socket for the settings' host and port. Raises ConfigError with one line for a person.

    It listens at once, so that a second server on the same port fails here and not after its model has been loaded.
    """
    import socket

    from server.config import ConfigError, check_exposure

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
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_until_stopped(settings, command, sock, process, began))


async def _serve_until_stopped(
    settings: Settings, command: Sequence[str] | None, sock: socket.socket, process: EngineProcess, began: float
) -> int:
    import asyncio
    from pathlib import Path

    from server.config import ConfigError
    from server.http.app import create_app
    from server.http.auth import KeyRing
    from server.http.serving import HttpServer
    from server.keys import KeysError
    from server.logs import configure_logging
    from server.metrics import Metrics
    from server.service import Service, ServiceSettings
    from server.supervisor import Limits, Supervisor

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
    starting = asyncio.create_task(_announce(sock, service, supervisor, began, as_text, keys is not None))
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
    return EXIT_OK


def _take_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT asks for a drain, the second ends everything at once."""
    import asyncio

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)


async def _announce(
    sock: socket.socket, service: Service, supervisor: Supervisor, began: float, as_text: bool, with_keys: bool
) -> None:
    """Show how the start goes, and what is served once it is. Raises EngineFailed."""
    import asyncio
    import logging

    # A line that is rewritten would be noise in a log file, and JSON must stay JSON.
    on_terminal = as_text and sys.stderr.isatty()
    show = asyncio.create_task(_show_progress(supervisor) if on_terminal else _log_progress(supervisor))
    try:
        await service.ready()
        ready = await supervisor.wait_ready()
    finally:
        show.cancel()
        if on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    seconds = time.monotonic() - began
    if as_text:
        print(summary(ready, url, seconds, with_keys), file=sys.stderr, flush=True)
        return
    identity = ready.identity
    fields = {
        "url": url,
        "model": identity.model,
        "dtype": identity.dtype,
        "kv_cache_dtype": identity.kv_cache_dtype,
        "quantization": identity.quantization,
        "device": identity.device,
        "context_length": ready.max_model_len,
        "max_running": ready.max_running,
        "memory_bytes": ready.memory_bytes,
        "api_keys": with_keys,
        "startup_seconds": round(seconds, 3),
    }
    logging.getLogger("stet").info("ready", extra={"fields": fields})


def _progress_line(supervisor: Supervisor) -> str:
    """The phase of the start, what it does, and how far it is."""
    progress = supervisor.progress
    if progress is None:
        return "starting the engine"
    share = "" if progress.fraction is None else f" {progress.fraction:4.0%}"
    return f"{progress.phase}: {progress.message}{share}"


async def _log_progress(supervisor: Supervisor) -> None:
    """A log line every few seconds, where nobody sees a line rewritten. A quick start has none."""
    import asyncio
    import logging

    while True:
        await asyncio.sleep(_PROGRESS_LOG_SECONDS)
        progress = supervisor.progress
        fields: dict[str, object] = {}
        if progress is not None:
            fields = {"phase": progress.phase, "what": progress.message}
            if progress.fraction is not None:
                fields["done"] = round(progress.fraction, 3)
        logging.getLogger("stet").info("starting", extra={"fields": fields})


async def _show_progress(supervisor: Supervisor) -> None:
    """One line on the terminal, rewritten."""
    import asyncio

    shown = ""
    while True:
        line = _progress_line(supervisor)
        if line != shown:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            shown = line
        await asyncio.sleep(_PROGRESS_SECONDS)


def summary(ready: Ready, url: str, seconds: float, with_keys: bool = False) -> str:
    """What is served and how to try it, for a person. with_keys: whether an API key is asked for."""
    from server.version import VERSION

    identity = ready.identity
    phases = ", ".join(f"{name} {value:.1f}" for name, value in ready.startup_seconds.items())
    memory = ", ".join(f"{kind.replace('_', ' ')} {_size(size)}" for kind, size in ready.memory_bytes.items() if size)
    tokens = ready.num_blocks * ready.block_size
    instructions = f", {identity.instruction_set}" if identity.instruction_set else ""
    threads = f", {identity.threads} threads" if identity.threads else ""
    rows = {
        "model": f"{identity.model} ({identity.architecture}, {_count(identity.num_parameters)} parameters)",
        "dtype": f"{identity.dtype}, KV cache {identity.kv_cache_dtype}",
        "quantization": identity.quantization,
        "device": f"{identity.device}{instructions}{threads}",
        "context": f"{ready.max_model_len:,} tokens, up to {ready.max_running} requests at once",
        "KV cache": f"{ready.num_blocks:,} blocks of {ready.block_size} tokens ({tokens:,} tokens)",
        "memory": memory,
        "API keys": "needed" if with_keys else "none: for this machine, or a network that is trusted",
        "started in": f"{seconds:.1f} s ({phases})",
    }
    key = ' -H "Authorization: Bearer $KEY"' if with_keys else ""
    lines = [f"Stet {VERSION} serves {identity.model} on {url}", ""]
    lines += [f"  {name:<14}{value}" for name, value in rows.items()]
    lines += [
        "",
        "Try it:",
        f"  curl {url}/generate{key} -H 'Content-Type: application/json' \\",
        """    -d '{"prompt": "Once upon a time", "max_new_tokens": 60}'""",
        f"OpenAI's clients: base_url {url}/v1, model {_served_name(identity.model)}; metrics: {url}/metrics",
        "",
    ]
    return "\n".join(lines)


def _served_name(model: str) -> str:
    """What requests call it: of a folder, its name alone."""
    return os.path.basename(os.path.realpath(model)) if os.path.isabs(model) or os.path.isdir(model) else model


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

"""The server's settings: one table that makes the flags, the environment variables and the page that lists them.

A setting is a field of `Settings` with its help text; its flag is `--its-name`, its variable `STET_ITS_NAME`. A flag
wins over a variable, a variable over the default. argparse and not typer: typer and what it imports take about 150 ms,
and a start is meant to take less than four seconds in all, model included.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from server.engine.config import EngineConfig

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)?B?", re.ASCII | re.IGNORECASE)
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off", ""})


class ConfigError(Exception):
    """A setting that cannot be used. One line for a person."""


def parse_bytes(text: str) -> int:
    """A size with an optional unit: 4096, 512MB (decimal), 2GiB (binary). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("a size such as 2GiB, 512MB or 4096")
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if size < 1:
        raise ValueError("a size above 0")
    return size


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `low` to `high`; its ValueError says what is allowed, as those of all parsers here."""
    allowed = f"an integer from {low}" + (f" to {high}" if high is not None else "")

    def parse(text: str) -> int:
        if (
            not re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII)
            or int(text) < low
            or (high is not None and int(text) > high)
        ):
            raise ValueError(allowed)
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise ValueError("seconds from 0 to 86400")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.01 <= value <= 1:
        raise ValueError("a fraction from 0.01 to 1")
    return value


def choice(*names: str) -> Callable[[str], str]:
    """A parser of one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return parse


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("a text that is not empty")
    return text


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", text) or not text.isprintable():
        raise ValueError("a URL such as http://127.0.0.1:4318")
    return text


def _switch(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("1 or 0")


def _setting(default: Any, parse: Callable[[str], Any], help: str, metavar: str = "", shown: str | None = None) -> Any:
    """A field of Settings. `metavar` stands for its value; `shown` tells a default that is not a plain value."""
    metadata = {"parse": parse, "help": help, "metavar": metavar, "shown": str(default) if shown is None else shown}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of `stet serve`, resolved. Sizes in bytes, times in seconds."""

    model: str = _setting("stet-tales", _text, "what to serve: a folder, a Hub name, or the embedded model", "MODEL")
    host: str = _setting("127.0.0.1", _text, "address to bind", "ADDRESS")
    port: int = _setting(8000, integer(0, 65535), "port to bind; 0 takes a free one", "PORT")
    api_keys: str | None = _setting(
        None, _text, "file of API keys, made by 'stet keys create'; it may change while the server runs", "FILE", "none"
    )
    insecure: bool = _setting(False, _switch, "allow an address that other machines can reach, without API keys")
    docs: bool = _setting(False, _switch, "serve /openapi.json, and /docs that shows it")
    revision: str | None = _setting(None, _text, "branch, tag or commit of a Hub model", "NAME", "the main one")
    offline: bool = _setting(False, _switch, "use only what is on this machine; download nothing")
    device: str = _setting("auto", choice("auto", "cpu", "cuda"), "where the model runs: auto, cpu or cuda", "DEVICE")
    dtype: str = _setting(
        "auto",
        choice("auto", "bfloat16", "float16", "float32"),
        "type of weights and activations: auto, bfloat16, float16 or float32",
        "DTYPE",
    )
    quantization: str | None = _setting(
        None,
        choice("none", "w8a16", "w8a8", "auto"),
        "how weights are stored and multiplied: none, w8a16, w8a8 or auto (the fastest int8 mode of the device)",
        "MODE",
        "as the checkpoint is",
    )
    no_deterministic: bool = _setting(
        False, _switch, "let cuBLAS compute unquantized layers: on CUDA, tokens may then depend on the batch"
    )
    max_model_len: int | None = _setting(
        None, integer(1), "tokens of one sequence, prompt and output", "TOKENS", "what the model was made for"
    )
    kv_cache_memory: int | None = _setting(
        None, parse_bytes, "memory of the KV cache, such as 2GiB", "SIZE", "a share of what is free"
    )
    kv_cache_dtype: str = _setting(
        "auto", choice("auto", "bf16", "int8"), "what the KV cache holds: auto, bf16 or int8", "DTYPE"
    )
    gpu_memory_fraction: float = _setting(
        0.9, _fraction, "how much of the GPU's memory the engine may take", "FRACTION"
    )
    block_size: int | None = _setting(None, integer(1, 1024), "tokens of one KV block", "TOKENS", "16; 64 on cuda")
    max_running: int = _setting(64, integer(1, 4096), "requests in one step at most", "COUNT")
    max_waiting: int = _setting(256, integer(0, 1_000_000), "requests that may wait; further ones get 429", "COUNT")
    deadline_ms: int | None = _setting(
        None, integer(100, 3_600_000), "time for a request that has no deadline_ms of its own", "MILLISECONDS", "none"
    )
    max_tokens_per_step: int = _setting(2048, integer(1, 1_000_000), "tokens computed in one step at most", "TOKENS")
    mixed_step_tokens: int | None = _setting(
        None,
        integer(1, 1_000_000),
        "prompt tokens beside running streams in one step at most",
        "TOKENS",
        "measured at warm-up",
    )
    no_prefix_caching: bool = _setting(False, _switch, "compute every prompt anew")
    threads: int | None = _setting(None, integer(1, 1024), "CPU threads of the engine", "COUNT", "the physical cores")
    drain_timeout: float = _setting(30.0, _seconds, "time for running requests to finish after SIGTERM", "SECONDS")
    max_crashes_per_minute: int = _setting(
        3, integer(1, 1000), "so many engine crashes within a minute, and it is not started again", "COUNT"
    )
    otlp_endpoint: str | None = _setting(
        None, _url, "collector to send traces to, by OTLP over HTTP, such as http://127.0.0.1:4318", "URL", "none"
    )
    log_format: str = _setting(
        "", choice("json", "text"), "log lines: json or text", "FORMAT", "text on a terminal, else json"
    )

    @property
    def resolved_log_format(self) -> str:
        """ "text" or "json"."""
        return self.log_format or ("text" if sys.stderr.isatty() else "json")

    def engine_config(self) -> EngineConfig:
        """What the engine process is told."""
        return EngineConfig(
            model=self.model,
            revision=self.revision,
            offline=self.offline,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_memory,
            max_running=self.max_running,
            max_tokens_per_step=self.max_tokens_per_step,
            mixed_step_tokens=self.mixed_step_tokens,
            prefix_caching=not self.no_prefix_caching,
            threads=self.threads,
            kv_cache_dtype=self.kv_cache_dtype,
            gpu_memory_fraction=self.gpu_memory_fraction,
            deterministic=not self.no_deterministic,
            log_format=self.resolved_log_format,
        )


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"STET_{name.upper()}"


class OneLineParser(argparse.ArgumentParser):
    """argparse that ends with one line on standard error and exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see '{self.prog} --help')", file=sys.stderr)
        raise SystemExit(2)


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(FIELDS)) -> None:
    """One flag for each setting of `names`. Values stay text here, so that flags and variables are read by the same
    code."""
    for name, field in FIELDS.items():
        if name not in names:
            continue
        text = f"{field.metadata['help']} (default: {field.metadata['shown']}; {variable(name)})".replace("%", "%%")
        if name == "model":
            parser.add_argument(name, nargs="?", default=None, metavar="MODEL", help=text)
        elif isinstance(field.default, bool):
            parser.add_argument(flag(name), dest=name, action="store_const", const="1", help=text)
        else:
            parser.add_argument(flag(name), dest=name, default=None, metavar=field.metadata["metavar"], help=text)


def resolve(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> Settings:
    """Settings from flags, then variables, then defaults. Raises ConfigError."""
    values: dict[str, Any] = {}
    for name, field in FIELDS.items():
        text, source = flags.get(name), flag(name)
        if text is None:
            text, source = environment.get(variable(name)), variable(name)
        if text is None:
            continue
        try:
            values[name] = field.metadata["parse"](text)
        except ValueError as error:
            raise ConfigError(f"{source}: {text!r} is not {error}") from None
    settings = Settings(**values)
    if (settings.mixed_step_tokens or 0) > settings.max_tokens_per_step:
        raise ConfigError("--mixed-step-tokens must not be above --max-tokens-per-step")
    if settings.max_running > settings.max_tokens_per_step:
        raise ConfigError("--max-running must not be above --max-tokens-per-step: each stream needs a token a step")
    return settings


def check_exposure(settings: Settings, addresses: Sequence[str]) -> None:
    """Refuse to be reachable by other machines unless asked to. Raises ConfigError.

    addresses: the numeric addresses that the host stands for.
    """
    if (
        settings.insecure
        or settings.api_keys is not None
        or all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses)
    ):
        return
    raise ConfigError(
        f"--host {settings.host} can be reached by other machines, and everyone there could use this server. Make API "
        "keys ('stet keys create') and name their file with --api-keys, bind 127.0.0.1, or say --insecure if the "
        "network in front of it is trusted"
    )


def flag_type(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser of ours, whose ValueError says what is allowed, as argparse wants it."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from None

    return parsed


def settings_table() -> str:
    """The table of docs/api.md, in Markdown."""
    lines = ["| flag | variable | default | what |", "|---|---|---|---|"]
    for name, field in FIELDS.items():
        value = f" {field.metadata['metavar']}" if field.metadata["metavar"] and name != "model" else ""
        shown = "off" if field.default is False else field.metadata["shown"]
        lines.append(f"| `{flag(name)}{value}` | `{variable(name)}` | {shown} | {field.metadata['help']} |")
    return "\n".join(lines)

"""Settings: flags, variables, defaults, and what is refused in one line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from server.config import (
    FIELDS,
    ConfigError,
    OneLineParser,
    Settings,
    add_flags,
    check_exposure,
    flag,
    parse_bytes,
    resolve,
    settings_table,
    variable,
)
from server.engine.config import EngineConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def parse(*arguments: str, **environment: str) -> Settings:
    parser = OneLineParser(prog="stet serve", allow_abbrev=False)
    add_flags(parser)
    return resolve(vars(parser.parse_args(arguments)), environment)


def test_defaults() -> None:
    assert parse() == Settings()
    config = Settings().engine_config()
    assert config == EngineConfig(log_format="json"), "standard error is no terminal here"


def test_flags() -> None:
    settings = parse(
        *"some/model --host ::1 --port 9 --revision r --offline --device cpu --dtype float32".split(),
        *"--max-model-len 64".split(),
        *"--kv-cache-memory 1.5GiB --max-running 3 --max-waiting 0 --max-tokens-per-step 512 --threads 2".split(),
        *"--mixed-step-tokens 32 --block-size 8 --no-prefix-caching --drain-timeout 2.5 --log-format json".split(),
        *"--insecure --quantization w8a16 --max-crashes-per-minute 9".split(),
        *"--kv-cache-dtype int8 --gpu-memory-fraction 0.5 --no-deterministic".split(),
    )
    config = settings.engine_config()
    assert config == EngineConfig(
        "some/model",
        "r",
        True,
        "cpu",
        "float32",
        "w8a16",
        64,
        8,
        3 * 2**29,
        3,
        512,
        32,
        False,
        2,
        "int8",
        0.5,
        False,
        log_format="json",
    )
    assert (settings.host, settings.port, settings.max_waiting, settings.drain_timeout) == ("::1", 9, 0, 2.5)
    assert (settings.log_format, settings.insecure, settings.max_crashes_per_minute) == ("json", True, 9)


def test_a_flag_wins_over_a_variable() -> None:
    assert parse("--port", "7", STET_PORT="8").port == 7
    assert parse(STET_PORT="8").port == 8
    assert parse("other", STET_MODEL="one").model == "other"
    assert parse(STET_MODEL="one").model == "one"
    assert parse(STET_OFFLINE="1").offline
    assert parse(STET_OFFLINE="true").offline
    assert not parse(STET_OFFLINE="0").offline
    assert not parse(STET_OFFLINE="").offline
    assert parse("--offline", STET_OFFLINE="0").offline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--port 65536", "--port: '65536' is not an integer from 0 to 65535"),
        ("--port x", "--port: 'x' is not an integer"),
        ("--max-running 9 --max-tokens-per-step 8", "--max-running must not be above --max-tokens-per-step"),
        ("--port ٣", "--port: '٣' is not an integer"),
        ("--port 8000.0", "is not an integer"),
        ("--deadline-ms 99", "--deadline-ms: '99' is not an integer from 100 to 3600000"),
        ("--max-running 0", "is not an integer from 1"),
        ("--quantization int4", "--quantization: 'int4' is not one of none, w8a16, w8a8, auto"),
        ("--kv-cache-dtype fp8", "is not one of auto, bf16, int8"),
        ("--gpu-memory-fraction 1.5", "--gpu-memory-fraction: '1.5' is not a fraction from 0.01 to 1"),
        ("--gpu-memory-fraction nan", "is not a fraction"),
        ("--dtype int8", "is not one of auto, bfloat16, float16, float32"),
        ("--device tpu", "is not one of auto, cpu, cuda"),
        ("--kv-cache-memory 2GX", "is not a size such as 2GiB"),
        ("--kv-cache-memory 0", "is not a size above 0"),
        ("--drain-timeout -1", "is not seconds from 0"),
        ("--drain-timeout nan", "is not seconds from 0"),
        ("--log-format xml", "is not one of json, text"),
        ("--mixed-step-tokens 512 --max-tokens-per-step 256", "must not be above"),
    ],
)
def test_bad_values(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments.split(" "))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="STET_PORT: 'x' is not"):
        parse(STET_PORT="x")
    with pytest.raises(ConfigError, match="STET_OFFLINE: 'maybe' is not 1 or 0"):
        parse(STET_OFFLINE="maybe")


@pytest.mark.parametrize("arguments", ["--por 1", "--unknown", "a b", "--port"])
def test_bad_flags_are_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("2GiB", 2**31),
        ("2gib", 2**31),
        ("2 GiB", 2**31),
        ("512MB", 512_000_000),
        ("0.5K", 500),
        ("3Ti", 3 * 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1.5.5G", "0", "0.0001", "1XiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="a size"):
        parse_bytes(text)


def test_exposure() -> None:
    check_exposure(Settings(), ["127.0.0.1", "::1", "127.9.9.9"])
    check_exposure(Settings(host="0.0.0.0", insecure=True), ["0.0.0.0"])
    for addresses in (["0.0.0.0"], ["::"], ["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["fe80::1%eth0"]):
        with pytest.raises(ConfigError, match="API keys"):
            check_exposure(Settings(host="x"), addresses)


def test_names() -> None:
    assert flag("max_model_len") == "--max-model-len"
    assert variable("max_model_len") == "STET_MAX_MODEL_LEN"


def test_the_page_lists_the_settings() -> None:
    assert settings_table() in PAGE.read_text()


def test_help_names_every_setting() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name, field in FIELDS.items():
        assert flag(name) in text
        assert variable(name) in text
        assert field.metadata["help"].split(",")[0] in text


def test_settings_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]

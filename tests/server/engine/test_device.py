"""Which device an engine runs on, and what is refused in one line."""

from __future__ import annotations

import logging

import pytest
import torch

from server.engine.build import build_engine
from server.engine.config import EngineConfig, StartupError
from server.engine.device import CpuDevice, choose_device, make_device
from server.engine.dtypes import kv_cache_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a GPU and without the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def with_gpu(machine: pytest.MonkeyPatch, major: int, minor: int) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))


def test_auto_takes_a_gpu_that_the_kernels_run_on(machine: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == "cpu"
    with_gpu(machine, 8, 0)
    assert choose_device("auto") == "cuda"
    assert choose_device("cpu") == "cpu"
    with_gpu(machine, 7, 5)
    assert choose_device("auto") == "cpu"
    with_gpu(machine, 9, 0)
    machine.setenv("TRITON_INTERPRET", "1")
    assert choose_device("auto") == "cpu"


def test_cuda_must_be_there(machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StartupError, match="torch sees no NVIDIA GPU here; use --device cpu"):
        choose_device("cuda")
    with_gpu(machine, 7, 5)
    with pytest.raises(StartupError, match=r"compute capability 7\.5, and 8\.0 is needed"):
        choose_device("cuda")
    with pytest.raises(StartupError, match="choose one of auto, cpu, cuda"):
        choose_device("tpu")
    machine.setenv("TRITON_INTERPRET", "1")
    with caplog.at_level(logging.WARNING):
        assert choose_device("cuda") == "cuda"
    assert "very slow" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(device="cpu", dtype="int4"), "--dtype int4 is not supported: choose one of auto, bfloat16"),
        (EngineConfig(device="cuda"), "no NVIDIA GPU"),
    ],
)
def test_what_a_device_does_not_do_is_told_in_one_line(
    machine: pytest.MonkeyPatch, config: EngineConfig, message: str
) -> None:
    with pytest.raises(StartupError) as caught:
        build_engine(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cpu_keeps_its_own_sizes(machine: pytest.MonkeyPatch) -> None:
    device = make_device(EngineConfig())
    assert isinstance(device, CpuDevice)
    assert (device.block_size, device.pipeline_depth) == (16, 1)
    assert device.describe()["deterministic"]


def test_the_kv_cache_has_the_models_type_unless_asked() -> None:
    assert kv_cache_dtype("auto", torch.float16) == torch.float16
    assert kv_cache_dtype("bf16", torch.bfloat16) == torch.bfloat16
    assert kv_cache_dtype("int8", torch.float32) == torch.int8

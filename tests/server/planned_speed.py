"""Predicted decode speed beside the measured: `python -m tests.server.planned_speed`, on an idle machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.loader import save_random_checkpoint
from server.engine.build import Engine, build_engine
from server.engine.config import EngineConfig
from server.engine.device import make_device
from server.engine.memory import available_memory_bytes
from server.planner.device import LocalDevice, PlannedDevice
from server.planner.plan import PlanRequest, make_plan
from server.planner.probe import decode_step, describe, measure
from server.planner.subject import find_subject

# Of 32 million parameters.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16_000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT, NEW = 96, 24


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens a second of `sequences` sequences together."""

    model: str
    mode: str
    sequences: int
    predicted: float
    measured: float


def measured_device(config: EngineConfig, now: Callable[[], float]) -> PlannedDevice:
    """The device of these settings, probed in this process."""
    device = make_device(config)
    return PlannedDevice("this machine", describe(device), None, 0, measure(device, config, now))


def engines_of(models: Mapping[str, str], modes: Iterable[str], threads: int | None) -> dict[tuple[str, str], Engine]:
    """A warm engine for each model and mode. models: a name for a person -> MODEL."""
    engines = {
        (name, mode): build_engine(
            EngineConfig(
                model=model, device="cpu", threads=threads, quantization=mode, max_running=32, max_tokens_per_step=4096
            )
        )
        for name, model in models.items()
        for mode in modes
    }
    for engine in engines.values():
        engine.settle()
    return engines


def compare(
    model: str, name: str, mode: str, sequences: int, device: PlannedDevice, engine: Engine, now: Callable[[], float]
) -> Row:
    """Predict and measure decoding."""
    request = PlanRequest(quantization=mode, context=PROMPT + NEW // 2, concurrency=sequences)
    speed = make_plan(find_subject(model), device, request, available_memory_bytes()).modes[0].speed
    if speed is None:
        raise RuntimeError("the device was not measured")
    seconds = decode_step(engine.core, sequences, PROMPT, NEW, now)
    return Row(name, mode, sequences, speed.decode_many.tokens_per_second, sequences / seconds)


def main() -> None:
    device = LocalDevice("cpu").load(measure=True, again=True)
    with tempfile.TemporaryDirectory() as folder:
        save_random_checkpoint(LLAMA, Path(folder), seed=0)
        models = {"stet-tales": "stet-tales", "random Llama, 32M": folder}
        print("| model | quantization | sequences | predicted tokens/s | measured | ratio |\n|---|---|---|---|---|---|")
        for (name, mode), engine in engines_of(models, device.backend.modes, threads=None).items():
            for sequences in (1, 4, 8, 16, 32):
                row = compare(models[name], name, mode, sequences, device, engine, time.perf_counter)
                rates = f"{row.predicted:,.0f} | {row.measured:,.0f} | {row.predicted / row.measured:.2f}"
                print(f"| {row.model} | {row.mode} | {row.sequences} | {rates} |", flush=True)


if __name__ == "__main__":
    main()

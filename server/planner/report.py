"""A plan as JSON, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.planner.plan import ModePlan, Plan, Speed
from server.planner.speed import StepTime
from server.planner.training import TEXTBOOK_ACTIVATION_BYTES, TrainingMemory
from server.planner.words import PlanError
from server.units import count, size

_LARGEST = 2**63 - 1


def as_dict(plan: Plan) -> dict[str, Any]:
    """The JSON of a plan: bytes, tokens, seconds, rates a second. Raises PlanError where a number leaves 64 bits."""
    config, rates = plan.subject.config, plan.device.rates
    found = {
        "model": {
            "name": plan.subject.name,
            "assumed_shape": plan.subject.assumed,
            "architecture": config.architecture,
            "parameters": config.num_parameters,
            "dtype": config.dtype,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "positions": config.max_position_embeddings,
        },
        "device": {
            "name": plan.device.title,
            "backend": plan.device.backend.name,
            "memory_bytes": plan.memory,
            "rates": None
            if rates is None
            else {
                "source": "measured" if rates.measured else "published",
                "bandwidth_bytes_per_second": rates.bandwidth,
                "matrix_operations_per_second": dict(rates.matrix_rates),
            },
        },
        "kv_cache": {"dtype": plan.kv_dtype, "bytes_per_token": plan.block.bytes_per_token},
        "context": plan.context,
        "concurrency": plan.concurrency,
        "quantization": {mode.mode: _mode(mode) for mode in plan.modes},
        "unavailable": list(plan.unavailable),
        "training": [_training(each) for each in plan.training],
    }
    if _largest(found) > _LARGEST:
        raise PlanError("this plan has numbers beyond 64 bits: give a smaller model, context, concurrency or batch")
    return found


def _mode(mode: ModePlan) -> dict[str, Any]:
    weights, cache = mode.weights, mode.cache
    return {
        "fits": not mode.missing,
        "missing_bytes": mode.missing,
        "weights_bytes": weights.total,
        "weights": {"linears": weights.linears, "norms": weights.norms, "rotary": weights.rotary},
        "workspace_bytes": mode.workspace,
        "kv_cache_budget_bytes": mode.kv_budget,
        "served": None
        if cache is None
        else {
            "kv_cache_bytes": cache.kv_cache_bytes,
            "num_blocks": cache.num_blocks,
            "max_model_len": cache.max_model_len,
        },
        "max_context": mode.max_context,
        "max_concurrency": mode.max_concurrency,
        "speed": None if mode.speed is None else _speed(mode.speed),
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "context": speed.context,
        "decode": _step(speed.decode_one, 1),
        "decode_concurrent": _step(speed.decode_many, speed.concurrency),
        "prefill": _step(speed.prefill, 1),
    }


def _step(step: StepTime, sequences: int) -> dict[str, Any]:
    return {
        "sequences": sequences,
        "seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "parts": {
            "linears": step.linears,
            "attention": step.attention,
            "elementwise": step.elementwise,
            "sampling": step.sampling,
            "overhead": step.overhead,
        },
    }


def _training(memory: TrainingMemory) -> dict[str, Any]:
    return {
        "precision": memory.precision,
        "sharding": memory.sharding,
        "devices": memory.devices,
        "bytes_per_device": {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "gathered": memory.gathered,
            "activations": memory.activations,
            "total": memory.total,
        },
        "textbook_bytes_per_device": memory.textbook,
    }


def _largest(value: Any) -> int:
    if isinstance(value, dict):
        return max((_largest(each) for each in value.values()), default=0)
    if isinstance(value, list):
        return max((_largest(each) for each in value), default=0)
    return value if isinstance(value, int) else 0


def as_text(plan: Plan) -> str:
    """For a terminal: what is planned, the modes side by side, training, and where the numbers come from."""
    config, rates = plan.subject.config, plan.device.rates
    lines = [
        f"{plan.subject.name}: {count(config.num_parameters)} parameters, {config.architecture}, {config.num_layers} "
        f"layers of {config.hidden_size:,}, {config.num_heads} heads, {config.num_kv_heads} KV heads of "
        f"{config.head_dim}, vocabulary {config.vocab_size:,}, {config.max_position_embeddings:,} positions"
    ]
    if config.num_experts:
        lines.append(
            f"  (of {config.num_experts} experts in each layer a token goes through {config.experts_per_token})"
        )
    if plan.subject.assumed:
        lines.append("  (the shape is assumed: that of published models with so many parameters)")
    lines.append(f"on {plan.device.title} with {size(plan.memory)}; KV cache {plan.kv_dtype}")
    lines += ["", *_table(_mode_rows(plan))]
    lines += [f"{mode} is not to be had" for mode in plan.unavailable]
    lines += ["", _source(plan)]
    if rates is not None:
        rate = ", ".join(f"{mode} {value / 1e9:,.0f}" for mode, value in rates.matrix_rates.items())
        lines.append(f"  memory {rates.bandwidth / 1e9:,.1f} GB/s; products in 10^9 operations a second: {rate}")
    lines += ["", "To train it, each device needs", *_table(_training_rows(plan.training))]
    lines.append(
        f"  textbook: {TEXTBOOK_ACTIVATION_BYTES} bytes a parameter for activations instead of those of the batch: "
        "4 + 20 bytes in float32"
    )
    return "\n".join(lines) + "\n"


def _mode_rows(plan: Plan) -> list[list[str]]:
    modes = plan.modes

    def row(name: str, cells: Sequence[str]) -> list[str]:
        return [name, *cells]

    def step(name: str, pick: str) -> list[str]:
        steps = [None if mode.speed is None else getattr(mode.speed, pick) for mode in modes]
        return row(name, ["-" if each is None else f"{_rate(each.tokens_per_second)} tok/s" for each in steps])

    rows = [
        row("quantization", [mode.mode for mode in modes]),
        row("weights", [size(mode.weights.total) for mode in modes]),
        row("  rotary tables of these", [size(mode.weights.rotary) for mode in modes]),
        row("workspace, about", [size(mode.workspace) for mode in modes]),
        row("KV cache, a token", [size(plan.block.bytes_per_token)] * len(modes)),
        row("KV cache, at most", [size(mode.kv_budget) for mode in modes]),
        row("served: KV cache", [_served(mode) for mode in modes]),
        row("served: context", ["-" if mode.cache is None else f"{mode.cache.max_model_len:,}" for mode in modes]),
        row(f"longest context of {plan.concurrency} at once", [f"{mode.max_context:,}" for mode in modes]),
        row(f"sequences of {plan.context:,} tokens at once", [f"{mode.max_concurrency:,}" for mode in modes]),
    ]
    if any(mode.speed is not None for mode in modes):
        rows += [
            step(f"prefill, {plan.context:,} tokens", "prefill"),
            step(f"decode at {plan.context:,} tokens, 1 sequence", "decode_one"),
            step(f"decode, {plan.concurrency} sequences", "decode_many"),
            row(
                "  mostly",
                ["-" if mode.speed is None else mode.speed.decode_many.slowest for mode in modes],
            ),
        ]
    return rows


def _served(mode: ModePlan) -> str:
    return f"{size(mode.missing)} missing" if mode.cache is None else size(mode.cache.kv_cache_bytes)


def _training_rows(training: Sequence[TrainingMemory]) -> list[list[str]]:
    rows = [["precision", "on", "parameters", "gradients", "Adam", "gathered", "activations", "total", "textbook"]]
    for each in training:
        where = "1 device" if each.devices == 1 else f"{each.devices:,}, {each.sharding}"
        parts = (each.parameters, each.gradients, each.optimizer, each.gathered, each.activations)
        rows.append([each.precision, where, *map(size, parts), size(each.total), size(each.textbook)])
    return rows


def _source(plan: Plan) -> str:
    rates = plan.device.rates
    if rates is None:
        return "How fast it would be is not known: this machine has not been measured (run stet plan while it is idle)"
    if rates.measured:
        return "Speeds are predicted from what was measured on this machine"
    return "Speeds are bounds from the maker's published figures, which no engine reaches; nothing was measured"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""The engine's decode and prefill speed beside `transformers` on the same weights, and beside the bandwidth floor.

Rounds run A B B A (engine, peer, peer, engine), so that a machine that slows down slows both. Before anything is timed,
at least one of two prompts must begin with the same greedy token on both: a gate against comparing different models,
where bfloat16 may tip a close choice; that the numbers are right is shown in tests/models/test_parity.py.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loadtests.machine import median_and_spread
from models.loader import load_config, save_random_checkpoint
from server.engine.build import Engine, build_engine
from server.engine.config import EngineConfig
from server.engine.request import Request, SamplingParams

PROMPT_LEN = 128
NEW_TOKENS = 64
BATCH_SIZES = (1, 4, 8, 16, 32)

# A Llama of 176 million parameters, the shape that the project compares servers with.
LLAMA_176M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(slots=True)
class Rates:
    """Tokens a second, one entry a round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def prompts(batch_size: int, vocab_size: int, salt: int) -> list[list[int]]:
    """Random prompts that differ in every call, so that no prefix is found in a cache."""
    generator = torch.Generator().manual_seed(1_000_003 * salt + batch_size)
    ids: list[list[int]] = torch.randint(3, vocab_size, (batch_size, PROMPT_LEN), generator=generator).tolist()
    return ids


def run_engine(engine: Engine, batch: list[list[int]], rates: Rates | None) -> list[list[int]]:
    """Generate greedily for all prompts at once, and record the rates. Returns the tokens.

    Prefill is timed until every request has its first token, decode over the steps in which all of them decode.
    """
    core = engine.core
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [Request(i + 1, ids, params, arrival=i) for i, ids in enumerate(batch)]
    for request in requests:
        core.add(request)
    prefill_seconds = decode_seconds = 0.0
    decode_tokens = 0
    while core.has_work:
        all_decode = all(request.output_token_ids for request in requests)
        started = time.perf_counter()
        outcomes = core.step()
        elapsed = time.perf_counter() - started
        if all_decode:
            decode_seconds += elapsed
            decode_tokens += sum(len(output.token_ids) for outcome in outcomes for output in outcome.outputs)
        else:
            prefill_seconds += elapsed
    if rates is not None:
        rates.prefill.append(sum(map(len, batch)) / prefill_seconds)
        rates.decode.append(decode_tokens / decode_seconds)
    return [request.output_token_ids for request in requests]


def run_transformers(model: torch.nn.Module, batch: list[list[int]], rates: Rates | None) -> list[list[int]]:
    """The same with `generate`: the first token alone gives the prefill, the rest the decode rate."""
    ids = torch.tensor(batch)
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]

    def call(new_tokens: int) -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            out = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out, time.perf_counter() - started

    _, prefill_seconds = call(1)
    out, seconds = call(NEW_TOKENS)
    if rates is not None:
        rates.prefill.append(ids.numel() / prefill_seconds)
        rates.decode.append(len(batch) * (NEW_TOKENS - 1) / (seconds - prefill_seconds))
    tokens: list[list[int]] = out[:, PROMPT_LEN:].tolist()
    return tokens


def decode_floor(engine: Engine, batch_size: int, bandwidth: float) -> float:
    """Tokens a second if a decode step only read the weights and the KV cache once, at `bandwidth` bytes a second.

    A step reads every weight but the embedding table, of which it needs one row a sequence; an output layer tied to the
    table is prepared as a weight of its own and is read.
    """
    kv_per_token = engine.memory_bytes["kv_cache"] / (
        engine.scheduler_config.num_blocks * engine.scheduler_config.block_size
    )
    config = load_config(engine.model_path)
    table_bytes = config.vocab_size * config.hidden_size * 2  # bfloat16
    context = PROMPT_LEN + NEW_TOKENS / 2
    step_bytes = engine.memory_bytes["weights"] - table_bytes + batch_size * context * kv_per_token
    return batch_size * bandwidth / step_bytes


def bench_model(
    name: str, path: str, bandwidth: float, rounds: int, say: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each batch size: rates of engine and peer, their ratio, and the engine's share of the floor."""
    from transformers import AutoModelForCausalLM

    # All prompts of the largest batch fit into one step, so that every request decodes from the second step on.
    engine = build_engine(
        EngineConfig(model=path, max_running=max(BATCH_SIZES), max_tokens_per_step=max(BATCH_SIZES) * PROMPT_LEN)
    )
    engine.settle()
    peer = AutoModelForCausalLM.from_pretrained(str(engine.model_path), dtype=torch.bfloat16)
    vocab_size = engine.vocab_size

    batch = prompts(2, vocab_size, salt=0)
    ours, theirs = run_engine(engine, batch, None), run_transformers(peer, batch, None)
    first_tokens_agree = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    if first_tokens_agree == 0:
        raise RuntimeError(f"{name}: the engine and transformers draw different first tokens; nothing to compare")

    rows: list[dict[str, object]] = []
    for batch_size in BATCH_SIZES:
        engine_rates, peer_rates = Rates(), Rates()
        for round_ in range(rounds):
            salts = [4 * round_ + k for k in range(1, 5)]
            run_engine(engine, prompts(batch_size, vocab_size, salts[0]), engine_rates)
            run_transformers(peer, prompts(batch_size, vocab_size, salts[1]), peer_rates)
            run_transformers(peer, prompts(batch_size, vocab_size, salts[2]), peer_rates)
            run_engine(engine, prompts(batch_size, vocab_size, salts[3]), engine_rates)
        decode, decode_spread = median_and_spread(engine_rates.decode)
        peer_decode, peer_spread = median_and_spread(peer_rates.decode)
        prefill, _ = median_and_spread(engine_rates.prefill)
        peer_prefill, _ = median_and_spread(peer_rates.prefill)
        floor = decode_floor(engine, batch_size, bandwidth)
        rows.append(
            {
                "model": name,
                "batch": batch_size,
                "decode_tokens_per_s": round(decode, 1),
                "decode_spread": round(decode_spread, 3),
                "transformers_decode": round(peer_decode, 1),
                "transformers_spread": round(peer_spread, 3),
                "decode_ratio": round(decode / peer_decode, 2),
                "share_of_bandwidth_floor": round(decode / floor, 3),
                "prefill_tokens_per_s": round(prefill, 1),
                "transformers_prefill": round(peer_prefill, 1),
                "prefill_ratio": round(prefill / peer_prefill, 2),
            }
        )
        say(f"{name} batch {batch_size}: {decode:.0f} tokens/s decode, {decode / peer_decode:.2f}x transformers")
    return rows


def bench_engine(bandwidth: float, rounds: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """The embedded model, then the 176M shape with random weights."""
    rows = bench_model("stet-tales", "stet-tales", bandwidth, rounds, say)
    with tempfile.TemporaryDirectory() as folder:
        save_random_checkpoint(LLAMA_176M, Path(folder), seed=0)
        rows += bench_model("llama-176m", folder, bandwidth, rounds, say)
    return rows


if __name__ == "__main__":
    # `python -m loadtests.engine_bench` is the protocol for a GPU; the module itself is the CPU's part of `make bench`.
    import sys

    from loadtests.gpu_bench import main

    sys.exit(main())

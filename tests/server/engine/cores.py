"""Engine cores for tests: one model, many small engines around it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch

from kernels.cpu.ops import CpuOps
from models.config import ModelConfig
from models.layers import DecoderModel
from models.loader import load_model, random_model, resolve_model
from server.engine.config import SchedulerConfig
from server.engine.core import EngineCore
from server.engine.plan import RequestOutput
from server.engine.request import Request, SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


@cache
def tiny_model() -> DecoderModel:
    """A random model of two layers, with logits far enough apart for sampling to matter."""
    return random_model(ModelConfig.from_hf(TINY), CpuOps(), seed=1, std=0.3)


@cache
def tales_model() -> DecoderModel:
    """The embedded model, with K and V in bfloat16 as it is served."""
    return load_model(resolve_model("stet-tales"), CpuOps())


def make_core(model: DecoderModel, **settings: Any) -> EngineCore:
    """A core with a cache of its own. `settings` are those of SchedulerConfig."""
    defaults: dict[str, Any] = {"num_blocks": 256, "max_model_len": 512, "eos_token_ids": model.config.eos_token_ids}
    config = SchedulerConfig(**(defaults | settings))
    ops = model.ops  # type: ignore[attr-defined]
    runner = Runner(
        model,
        ops,
        config.num_blocks,
        config.block_size,
        config.eos_token_ids,
        torch.bfloat16,
        max_tokens=config.max_tokens_per_step,
        max_running=config.max_running,
    )
    return EngineCore(runner, Scheduler(config))


def run_all(
    core: EngineCore,
    requests: Iterable[Request],
    between_steps: Callable[[], None] = lambda: None,
) -> dict[int, list[RequestOutput]]:
    """Add all requests, step until the core is idle, and return each request's outputs in order."""
    outputs: dict[int, list[RequestOutput]] = {}
    for request in requests:
        core.add(request)
        outputs[request.request_id] = []
    while core.has_work:
        for outcome in core.step():
            for output in outcome.outputs:
                outputs[output.request.request_id].append(output)
        core.scheduler.check_integrity()
        between_steps()
    return outputs


def tokens_of(outputs: Sequence[RequestOutput]) -> list[int]:
    """The tokens delivered, joined."""
    return [token for output in outputs for token in output.token_ids]


def random_params(rng: random.Random, max_new_tokens: int, vocab_size: int) -> SamplingParams:
    """Parameters as a person might mix them: some greedy, some with every filter and penalty on."""

    def some(values: Sequence[Any]) -> Any:
        return rng.choice(values)

    return SamplingParams(
        max_new_tokens=rng.randint(1, max_new_tokens),
        temperature=some([0.0, 0.7, 1.0, 1.6]),
        top_k=some([0, 0, 5, 40]),
        top_p=some([1.0, 1.0, 0.9, 0.5]),
        min_p=some([0.0, 0.0, 0.05]),
        typical_p=some([1.0, 1.0, 0.9]),
        repetition_penalty=some([1.0, 1.0, 1.3]),
        presence_penalty=some([0.0, 0.0, 0.5]),
        frequency_penalty=some([0.0, 0.0, 0.5]),
        seed=rng.getrandbits(64),
        logit_bias=some([(), (), ((rng.randrange(vocab_size), 3.0),)]),
        min_new_tokens=0,
        ignore_eos=some([True, False]),
    )

"""A real server on the Triton kernels: HTTP in, tokens out, in the interpreter where there is no GPU.

bfloat16, int8 weights and an int8 cache at once; the second prompt starts with blocks of the first. The greedy ids are
those of the reference backend with the same weights and cache. (Preemption and every number of rows:
tests/server/engine/test_cuda_runner.py.)
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from kernels.reference import ReferenceOps
from loadtests.processes import RunningServer, running_server
from models.loader import load_model, resolve_model
from server.engine.config import SchedulerConfig
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from tests.end_to_end.client import post
from tests.server.engine.cores import run_all, tokens_of

FLAGS = """--device cuda --quantization w8a16 --kv-cache-dtype int8 --block-size 16 --max-model-len 64 --max-running 2
    --max-tokens-per-step 32 --kv-cache-memory 1MiB"""
BEGINNING = "Once upon a time there was a little fox who loved the garden. One day the fox"
PROMPTS = [f"{BEGINNING} found a", f"{BEGINNING} lost a"]
NUM_TOKENS = 5


def reference_ids() -> list[list[int]]:
    """The same requests on the reference backend, each alone."""
    path = resolve_model("stet-tales")
    ops = ReferenceOps()
    model = load_model(path, ops, quantization="w8a16")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = SchedulerConfig(num_blocks=16, max_model_len=64, eos_token_ids=model.config.eos_token_ids)
    found = []
    for index, prompt in enumerate(PROMPTS):
        runner = Runner(model, ops, config.num_blocks, config.block_size, config.eos_token_ids, torch.int8)
        request = Request(index, tokenizer.encode(prompt).ids, SamplingParams(NUM_TOKENS, temperature=0.0))
        found.append(tokens_of(run_all(EngineCore(runner, Scheduler(config)), [request])[index]))
    return found


async def ask(server: RunningServer, prompt: str, stream: bool) -> Any:
    request = {"prompt": prompt, "max_new_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    return await post(server, request | {"stream": stream})


def test_the_server_gives_the_reference_ids(tmp_path: Path) -> None:
    with running_server(FLAGS.split(), log=tmp_path / "log") as server:
        server.wait_ready(120)
        answers = [
            asyncio.run(ask(server, prompt, stream)) for prompt, stream in zip(PROMPTS, [False, True], strict=True)
        ]
        info, metrics = server.get("/info")[1].decode(), server.get("/metrics")[1].decode()
    assert [answer.token_ids for answer in answers] == reference_ids()
    assert answers[1].usage["cached_tokens"] == 16
    assert '"w8a16"' in info
    assert '"int8"' in info
    assert 'stet_kernel_fallback_total{op="compile"}' not in metrics

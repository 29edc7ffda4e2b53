"""A real server on the Triton kernels: HTTP in, tokens out, in the interpreter where there is no GPU.

bfloat16, int8 weights and an int8 cache at once; the second prompt starts with blocks of the first. The greedy ids are
those of the reference backend with the same weights and cache. The model is random and small, with the embedded
model's tokenizer; the embedded model itself runs on these kernels in tests/models/test_cuda_backend.py, preemption and
all buckets of rows in tests/server/engine/test_cuda_runner.py.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from kernels.reference import ReferenceOps
from loadtests.processes import RunningServer, running_server
from models.loader import load_model, resolve_model, save_random_checkpoint
from server.engine.config import SchedulerConfig
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from tests.end_to_end.client import post
from tests.server.engine.cores import run_all, tokens_of

FLAGS = """--device cuda --quantization w8a16 --kv-cache-dtype int8 --block-size 16 --max-model-len 64 --max-running 1
    --max-tokens-per-step 32 --kv-cache-memory 1MiB"""
BEGINNING = "Once upon a time there was a little fox who loved the garden. One day the fox"
PROMPTS = [f"{BEGINNING} found a", f"{BEGINNING} lost a"]
NUM_TOKENS = 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 3840,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
# With this seed the best logit of each step is 0.2 standard deviations or more ahead of the next, which is beyond what
# bfloat16 changes, and the two prompts draw different ids from the first on.
SEED = 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as one would serve it."""
    folder = tmp_path / "model"
    save_random_checkpoint(CONFIG, folder, SEED, std=0.15)
    tales = resolve_model("stet-tales")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tales / name, folder / name)
    return folder


def reference_ids(path: Path) -> list[list[int]]:
    """The same requests on the reference backend, each alone."""
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


def test_the_server_gives_the_reference_ids(model: Path, tmp_path: Path) -> None:
    with running_server([str(model), *FLAGS.split()], log=tmp_path / "log") as server:
        server.wait_ready(120)
        answers = [
            asyncio.run(ask(server, prompt, stream)) for prompt, stream in zip(PROMPTS, [False, True], strict=True)
        ]
        info, metrics = server.get("/info")[1].decode(), server.get("/metrics")[1].decode()
    assert [answer.token_ids for answer in answers] == reference_ids(model)
    assert answers[1].usage["cached_tokens"] == 16
    assert '"w8a16"' in info
    assert '"int8"' in info
    assert 'stet_kernel_fallback_total{op="compile"}' not in metrics

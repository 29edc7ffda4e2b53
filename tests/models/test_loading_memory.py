"""What loading takes: never the unquantized model, nor two copies of the quantized one, nor the mapped file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.cpu.native import LibraryMissing
from kernels.cpu.ops import CpuOps
from kernels.reference import ReferenceOps
from models.config import ModelConfig
from models.loader import new_model, save_random_checkpoint

# 91 million parameters in the layers, 25 in each table: sizes that occur, at which tables are a large part.
HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 24_576,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}

# Loads a small model first, so that what the libraries take once is there before; then prints the bytes of memory that
# loading the large one took at its peak, and the bytes of its weights.
MEASURE = """
import re, sys
from pathlib import Path
from kernels.cpu.ops import CpuOps
from kernels.reference import ReferenceOps
from models.loader import load_model

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

ops = {"reference": ReferenceOps, "cpu": CpuOps}[sys.argv[3]]()
small = load_model(Path(sys.argv[1]), ops, quantization=sys.argv[4])
before = memory("VmRSS")
model = load_model(Path(sys.argv[2]), ops, quantization=sys.argv[4])
print(memory("VmHWM") - before, model.weight_bytes)
"""


def write_large_checkpoint(folder: Path, hf_config: dict[str, Any]) -> None:
    """Random weights in which the same megabyte comes again and again: drawing them all would take seconds."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = ModelConfig.from_hf(hf_config)
    header: dict[str, Any] = {}
    end = 0
    for name, slot in new_model(config, ReferenceOps(), "none").slots().items():
        begin, end = end, end + 2 * math.prod(slot.shape)
        header[name] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    block = (
        torch.randn(1 << 19, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8).numpy().tobytes()
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


@pytest.mark.parametrize(("ops", "tied"), [("reference", True), ("reference", False), ("cpu", True)])
def test_the_unquantized_model_is_never_in_memory(tmp_path: Path, ops: str, tied: bool) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's memory is read from Linux")
    if ops == "cpu":
        try:
            CpuOps(threads=1)
        except LibraryMissing as error:
            pytest.skip(str(error))
    config = HF_CONFIG | {"tie_word_embeddings": tied}
    save_random_checkpoint(config | {"vocab_size": 64, "num_hidden_layers": 1}, tmp_path / "small", 0)
    write_large_checkpoint(tmp_path / "large", config)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), ops, "w8a8"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    peak, weights = map(int, result.stdout.split())
    assert weights > 100e6
    print(f"{ops}, tied {tied}: {weights / 1e6:.0f} MB of weights, at the peak {peak / weights:.3f} times as much")
    assert peak <= 1.15 * weights

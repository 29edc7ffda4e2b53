"""From an unquantized checkpoint to an int8 one: half the bytes, and the model that loading in that mode would give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_greedy import greedy
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import QuantizationMode
from kernels.reference import ReferenceOps
from models import reader
from models.compressed_tensors import Int8Mode
from models.errors import ModelError
from models.hub import resolve_model
from models.layers import DecoderModel
from models.llama import Llama
from models.loader import LoadProgress, load_config, load_model, save_random_checkpoint
from models.quantize import HEAD, TABLE, quantize_checkpoint
from models.smooth import Smoothing
from server.cli import main

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


def make(folder: Path, **fields: Any) -> Path:
    save_random_checkpoint(HF_CONFIG | fields, folder, 7, 0.2)
    return folder


def logits(model: DecoderModel) -> Tensor:
    ((_, rows),) = greedy(model, model.ops, [list(range(20))], 1)  # type: ignore[attr-defined]
    return rows


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("w8a8", {}),
        ("w8a16", {"torch_dtype": "float16"}),
        ("w8a8", {"torch_dtype": "float32", "tie_word_embeddings": True}),
    ],
)
def test_loads_by_path_alone_to_the_same_bits(
    tmp_path: Path, mode: Int8Mode, fields: dict[str, Any], shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", 3000)  # so that these small tensors come in pieces too
    source, target = make(tmp_path / "source", **fields), tmp_path / "deep" / "target"
    written = quantize_checkpoint(source, target, mode, max_shard_bytes=shard_bytes)
    model = load_model(target, ReferenceOps())
    assert torch.equal(logits(model), logits(load_model(source, ReferenceOps(), quantization=mode)))
    assert isinstance(model, Llama)
    assert model.head.mode == model.table.mode == model.layers[0].mlp.down.mode == mode
    other: QuantizationMode = "w8a16" if mode == "w8a8" else "w8a8"
    expected = logits(load_model(source, ReferenceOps(), quantization=other))
    assert torch.equal(logits(load_model(target, ReferenceOps(), quantization=other)), expected)
    # The library that defines the format reads it too.
    files = sorted(target.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == written
    if shard_bytes == 20_000:
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert len(files) > 3
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == written
        assert {name: index["weight_map"][name] for name in tensors}.keys() == tensors.keys()
    else:
        assert [file.name for file in files] == ["model.safetensors"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep", [(TABLE,), (HEAD,), (TABLE, HEAD), ("model.layers.1.mlp.down_proj",)])
def test_kept_modules(tmp_path: Path, keep: tuple[str, ...], tied: bool) -> None:
    source, target = make(tmp_path / "source", tie_word_embeddings=tied), tmp_path / "target"
    quantize_checkpoint(source, target, "w8a8", keep=keep)
    model = load_model(target, ReferenceOps())
    assert isinstance(model, Llama)
    modes = model.table.mode, model.head.mode, model.layers[1].mlp.down.mode, model.layers[0].mlp.down.mode
    ends = [TABLE in keep or (tied and HEAD in keep), HEAD in keep or (tied and TABLE in keep)]
    kept = [*ends, keep[0].endswith("down_proj"), False]
    assert modes == tuple("none" if each else "w8a8" for each in kept)
    same = [TABLE, *keep] if tied and HEAD in keep else keep
    expected = load_model(
        source, ReferenceOps(), quantization="w8a8", keep=[name for name in same if not tied or name != HEAD]
    )
    assert torch.equal(logits(model), logits(expected))


def test_half_the_size_and_all_that_belongs_to_it(tmp_path: Path) -> None:
    tales, target = resolve_model("stet-tales"), tmp_path / "target"
    seen: list[LoadProgress] = []
    quantize_checkpoint(tales, target, "w8a8", progress=seen.append)
    assert size(target) < 0.52 * size(tales)
    assert seen[-1].loaded_bytes == seen[-1].total_bytes
    names = {file.name for file in target.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (target / "tokenizer.json").read_bytes() == (tales / "tokenizer.json").read_bytes()
    assert load_config(target).eos_token_ids == load_config(tales).eos_token_ids


def test_weights_in_other_formats_and_receipts_are_not_copied(tmp_path: Path, source: Path) -> None:
    for name in ("pytorch_model.bin", "model.onnx", "receipt-none.json", "consolidated.safetensors", ".hidden"):
        (source / name).write_bytes(b"{}")
    (source / "chat_template.jinja").symlink_to(source / "config.json")  # the Hub's cache is made of links
    (source / "onnx").mkdir()
    quantize_checkpoint(source, tmp_path / "target", "w8a8")
    names = {file.name for file in (tmp_path / "target").iterdir()}
    assert names == {"chat_template.jinja", "config.json", "model.safetensors"}
    assert not (tmp_path / "target" / "chat_template.jinja").is_symlink()


def test_a_change_comes_before_the_rounding(tmp_path: Path) -> None:
    """Powers of two that cancel, as SmoothQuant's do: in float16 too, whose range they may leave."""
    source = make(tmp_path / "source", torch_dtype="float16")
    factors = 2.0 ** torch.arange(-32, 32)
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    smoothing = Smoothing(
        {"model.layers.0.post_attention_layernorm.weight": 1 / factors}, dict.fromkeys(names, factors)
    )
    quantize_checkpoint(source, tmp_path / "target", "w8a16", change=smoothing.apply)

    tensors = load_file(source / "model.safetensors")
    changed = {name: smoothing.apply(name, tensor) for name, tensor in tensors.items()}
    save_file(changed, source / "model.safetensors")
    expected = load_model(source, ReferenceOps(), quantization="w8a16")
    assert torch.equal(logits(load_model(tmp_path / "target", ReferenceOps())), logits(expected))


def test_refusals(tmp_path: Path, source: Path) -> None:
    def refusal(source: Path, target: Path, **more: Any) -> str:
        with pytest.raises(ModelError) as caught:
            quantize_checkpoint(source, target, "w8a8", **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    target = tmp_path / "target"
    assert "source exists and is not an empty folder; give another one" in refusal(source, source)
    assert "config.json exists and is not an empty folder" in refusal(source, source / "config.json")
    assert "there is no such module" in refusal(source, target, keep=["model.layers.3.mlp.down_proj"])
    assert "computed as one weight" in refusal(source, target, keep=["model.layers.0.mlp.up_proj"])
    under_a_file = refusal(source, source / "config.json" / "target")
    assert "cannot be written (Not a directory" in under_a_file
    target.mkdir()
    quantize_checkpoint(source, target, "w8a8")
    assert "is quantized already; use the checkpoint" in refusal(target, tmp_path / "again")
    (source / "config.json").write_text(json.dumps(HF_CONFIG | {"architectures": ["MambaForCausalLM"]}))
    assert "architecture 'MambaForCausalLM' is not supported" in refusal(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_is_left_of_what_was_not_finished(tmp_path: Path, source: Path) -> None:
    def interrupt(progress: LoadProgress) -> None:
        if progress.loaded_bytes > progress.total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "a" / "b", "w8a8", max_shard_bytes=20_000, progress=interrupt)
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-m", "server.cli", "quantize", "stet-tales", str(target), "--keep", "head"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--mode", "w8a16"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"MB of weights in {target}" in done.stdout
    assert "quantizing stet-tales" in done.stderr
    stored = load_config(target).quantization
    assert stored is not None
    assert stored.mode == "w8a16"

    threads = torch.get_num_threads()
    try:
        assert main(command[3:]) == 2
    finally:
        torch.set_num_threads(threads)
    refusal = f"stet: {target} exists and is not an empty folder; give another one, or remove it first"
    assert capfd.readouterr().err.splitlines()[-1] == refusal

"""The planner: its bytes against loaded models and torch, its speeds against measured ones, and what a person sees."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.native import LibraryMissing
from kernels.cpu.ops import CpuOps
from kernels.cuda.ops import CudaOps
from kernels.ops import Ops
from kernels.portable import PortableOps
from models.compressed_tensors import write_quantization
from models.config import ModelConfig
from models.hub import BUILT_IN_MODELS
from models.loader import fill, new_model, random_tensors, save_random_checkpoint
from server.cli import main
from server.engine.build import build_engine
from server.engine.config import EngineConfig
from server.engine.device import make_device
from server.engine.memory import available_memory_bytes
from server.planner import device as planned_device
from server.planner.device import LocalDevice, PlannedDevice, card
from server.planner.plan import PlanRequest, make_plan
from server.planner.probe import describe
from server.planner.rates import CARDS, LinearCurve
from server.planner.report import as_dict
from server.planner.sizes import Backend, linear_shapes, weight_bytes
from server.planner.speed import SpeedModel
from server.planner.subject import Subject, config_of_count, find_subject, of_config, parse_count
from server.planner.training import BFLOAT16, FLOAT32, activation_bytes, training_memory
from server.planner.words import CARD_NAMES, MODES, PlanError
from tests.server.planned_speed import LLAMA, compare, engines_of, measured_device

GIB = 2**30
# Sizes that no layout divides evenly.
ODD = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1003,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "intermediate_size": 101,
    "max_position_embeddings": 300,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stet"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_random_checkpoint(LLAMA, folder, seed=0)
    return folder


# Memory


def backend_and_ops(name: Any) -> tuple[Backend, Ops]:
    ops: Ops
    if name == "cuda":
        return card("h100-80gb").backend, CudaOps(torch.bfloat16)
    if name == "portable":
        ops, group = PortableOps(), 4
    else:
        try:
            ops = CpuOps(1)
        except LibraryMissing as error:
            pytest.skip(str(error))
        group = ops.team.group_of
    dtype = str(ops.dtype).removeprefix("torch.")
    return Backend(name, None if name == "cpu" else dtype, dtype, {}, MODES, 16, group, name == "portable"), ops


def keeps_of(config: ModelConfig) -> Callable[[str], bool] | None:
    stored = config.quantization
    return None if stored is None else lambda module: not stored.covers(module)


@pytest.mark.parametrize("name", ["cpu", "portable", "cuda"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("Qwen3ForCausalLM", "bfloat16"), ("LlamaForCausalLM", "float32"), ("SmolLM3ForCausalLM", "float16")],
)
def test_weights_take_what_the_backends_say(architecture: str, dtype: str, tied: bool, name: str) -> None:
    backend, ops = backend_and_ops(name)
    hf = {**ODD, "architectures": [architecture], "torch_dtype": dtype, "tie_word_embeddings": tied}
    # An int8 checkpoint that has some modules unquantized: of one kind, of one layer, and a table.
    kept = ["model.layers.1.self_attn.o_proj", "re:.*down_proj", "model.embed_tokens"]
    stored = write_quantization("w8a8", kept, embedding=False)
    for config in (ModelConfig.from_hf(hf), ModelConfig.from_hf({**hf, "quantization_config": stored})):
        quantization = config.quantization
        for mode in MODES if quantization is None else MODES[1:]:
            model = new_model(config, ops, mode, keeps_of(config))  # type: ignore[arg-type]
            slots = model.slots()
            fill(slots, random_tensors(slots, config, 0, 0.02))
            assert weight_bytes(config, mode, backend).total == model.weight_bytes, (mode, quantization)


FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 72, "n_layer": 3, "n_head": 6, "n_positions": 300, "layer_norm_epsilon": 1e-5},
    "GPTNeoXForCausalLM": {"layer_norm_eps": 1e-5},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {"sliding_window": 100, "sliding_window_pattern": 2},
    "GraniteForCausalLM": {"residual_multiplier": 0.2},
    "Olmo2ForCausalLM": {},
    "Phi3ForCausalLM": {"partial_rotary_factor": 0.67},
    "StableLmForCausalLM": {"layer_norm_eps": 1e-5, "use_parallel_residual": True},
    "MixtralForCausalLM": {"hidden_size": 80, "intermediate_size": 48, "num_local_experts": 5},
    "Qwen3MoeForCausalLM": {"hidden_size": 80, "moe_intermediate_size": 48, "num_experts": 9, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", ["cpu", "portable", "cuda"])
@pytest.mark.parametrize("architecture", list(FAMILY_FIELDS))
def test_weights_of_the_other_families(architecture: str, name: str) -> None:
    backend, ops = backend_and_ops(name)
    hf = {**ODD, "architectures": [architecture], **FAMILY_FIELDS[architecture]}
    if architecture == "GPTNeoXForCausalLM":
        hf["hidden_act"] = "gelu"
    config = ModelConfig.from_hf(hf)
    for mode in MODES:
        model = new_model(config, ops, mode)  # type: ignore[arg-type]
        slots = model.slots()
        assert sum(math.prod(slot.shape) for slot in slots.values()) == config.num_parameters
        fill(slots, random_tensors(slots, config, 0, 0.02))
        assert weight_bytes(config, mode, backend).total == model.weight_bytes, mode


def test_a_step_reads_the_experts_in_use() -> None:
    """One token goes through two experts of eight; with many tokens every expert is read, by a quarter of the rows."""
    config = ModelConfig.from_hf(
        {**ODD, "architectures": ["MixtralForCausalLM"], "hidden_size": 80, "intermediate_size": 48}
    )
    experts = [shape for shape in linear_shapes(config) if shape.experts == 8]
    assert [shape.name for shape in experts] == ["gate_up", "down"]
    for shape in experts:
        assert shape.share(1) == 0.25
        assert shape.rows_of_expert(1) == 1
        assert shape.share(1000) > 0.999
        assert shape.rows_of_expert(1000) == 250
    assert sum(shape.num_weights for shape in experts) == 8 * 3 * (2 * 48 * 80 + 80 * 48)


def local_device(config: EngineConfig) -> PlannedDevice:
    return PlannedDevice("this machine", describe(make_device(config)), None, 0, None)


@pytest.mark.parametrize(("quantization", "kv_cache_dtype"), [("none", "auto"), ("w8a16", "int8"), ("w8a8", "auto")])
@pytest.mark.parametrize("name", ["stet-tales", "llama"])
def test_predicted_memory_is_what_the_engine_reports(
    name: str, quantization: str, kv_cache_dtype: str, llama: Path
) -> None:
    model = str(llama) if name == "llama" else name
    config = EngineConfig(
        model=model,
        device="cpu",
        threads=1,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=256,
        max_running=4,
        max_tokens_per_step=64,
    )
    device = local_device(config)
    request = PlanRequest(
        quantization=quantization, kv_cache_dtype=kv_cache_dtype, context=256, concurrency=4, max_tokens_per_step=64
    )
    plan = make_plan(find_subject(model), device, request, available_memory_bytes())
    engine = build_engine(config)
    assert plan.modes[0].cache is not None
    assert plan.modes[0].weights.total == pytest.approx(engine.memory_bytes["weights"], rel=0.03)
    assert plan.modes[0].cache.kv_cache_bytes == pytest.approx(engine.memory_bytes["kv_cache"], rel=0.03)
    assert plan.modes[0].cache.num_blocks == engine.scheduler_config.num_blocks


@given(
    count=st.integers(10**6, 10**12),
    memory=st.integers(2**20, 2**41),
    name=st.sampled_from(["cpu", *CARDS]),
    context=st.none() | st.integers(1, 8192),
    mode=st.sampled_from(MODES),
)
@settings(max_examples=150, deadline=None)
def test_with_what_is_missing_it_fits_and_with_less_it_does_not(
    count: int, memory: int, name: str, context: int | None, mode: str
) -> None:
    kv = {"auto": {"bfloat16": "bfloat16"}, "int8": {"bfloat16": "int8"}}
    own = PlannedDevice("cpu", Backend("cpu", None, "float32", kv, MODES, 16), None, 150 << 20, None)
    device = own if name == "cpu" else card(name)
    subject = Subject("x", config_of_count(count), assumed=True)
    request = PlanRequest(memory=memory, quantization=mode, context=context)

    try:
        make_plan(subject, device, request, 0)
    except PlanError as error:
        said, param = str(error), error.param
    else:
        return
    assert param == "memory"
    assert "\n" not in said
    number, unit = said.split("What would help: ")[1].split(" of memory")[0].replace(",", "").split(" ")
    enough = int(float(number) * (2**30 if unit == "GiB" else 2**20)) + 1
    assert make_plan(subject, device, replace(request, memory=enough), 0).modes[0].missing == 0
    with pytest.raises(PlanError):
        make_plan(subject, device, replace(request, memory=int(enough * 0.99) - (1 << 20)), 0)


def test_modes_that_fit_stand_beside_those_that_do_not() -> None:
    plan = make_plan(Subject("8b", config_of_count(8 * 10**9)), card("l4-24gb"), PlanRequest(memory=16 * GIB), 0)
    found = as_dict(plan)["quantization"]
    assert [found[mode]["fits"] for mode in MODES] == [False, True, True]
    assert found["none"]["served"] is None
    assert found["none"]["missing_bytes"] > GIB
    enough = PlanRequest(memory=16 * GIB + found["none"]["missing_bytes"] + (1 << 20))
    plan = make_plan(Subject("8b", config_of_count(8 * 10**9)), card("l4-24gb"), enough, 0)
    assert [mode.missing for mode in plan.modes] == [0, 0, 0]


# What is planned for


@pytest.mark.parametrize("text", ["1M", "15m", "135M", "600M", "1.7b", "8b", "70b", "405B", "1t", "10T"])
def test_a_shape_from_a_number_of_parameters(text: str) -> None:
    count = parse_count(text)
    assert count is not None
    config = config_of_count(count)
    assert config.num_parameters == pytest.approx(count, rel=0.04)
    assert 1 <= config.num_kv_heads <= config.num_heads


def test_known_sizes_get_the_shapes_of_known_models() -> None:
    for count, layers, hidden, kv_heads in ((8.03e9, 32, 4096, 8), (70.6e9, 80, 8192, 8), (134.5e6, 30, 576, 3)):
        config = config_of_count(round(count))
        assert config.num_layers == pytest.approx(layers, rel=0.25)
        assert config.hidden_size == pytest.approx(hidden, rel=0.1)
        assert config.num_kv_heads == kv_heads


def test_of_a_hub_model_only_the_configuration_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []

    def snapshot_download(model: str, *, allow_patterns: list[str], **_: Any) -> str:
        wanted.extend(allow_patterns)
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_subject("some-org/some-model").config.hidden_size == 512
    assert set(wanted) == {"config.json", "generation_config.json"}


# Speed


def test_a_curve_goes_through_its_points() -> None:
    curve = LinearCurve(1, (1, 4, 16), (1.0, 2.0, 8.0))
    assert [curve.at(rows) for rows in (1, 2, 4, 10, 16, 64)] == [1, pytest.approx(4 / 3), 2, 5, 8, 32]


@given(
    prompt=st.integers(1, 700),
    chunk=st.integers(1, 300),
    window=st.none() | st.integers(1, 400),
)
@settings(max_examples=60, deadline=None)
def test_prefill_counts_every_pair_that_attention_sees(prompt: int, chunk: int, window: int | None) -> None:
    config = replace(
        config_of_count(10**7), sliding_window=window, sliding_layers=(window is not None,) * 9, num_layers=9
    )
    device = card("h100-80gb")
    assert device.rates is not None
    rates = replace(CARDS["h100-80gb"].rates, bandwidth=1e300)
    step = SpeedModel(config, device.backend, rates, "none", "bfloat16").prefill(prompt, chunk)
    pairs = sum(min(i + 1, window or i + 1) for i in range(prompt))
    operations = 4 * 9 * pairs * config.num_heads * config.head_dim
    assert step.attention == pytest.approx(operations / rates.bfloat16_rate)
    layers = config.num_parameters - config.vocab_size * config.hidden_size
    assert step.linears == pytest.approx(
        2 * (layers * prompt + config.vocab_size * config.hidden_size) / rates.bfloat16_rate, rel=0.02
    )


def test_predicted_decode_speed_is_within_a_fifth_of_the_measured(llama: Path) -> None:
    # One thread by its own time, so that what else the machine does disturbs it least; what is left of that, and what
    # a neighbour takes of the caches and of the memory, is met by trying again whatever was missed. Neighbours that
    # stay cost no more than half: what is further off is a mistake of ours, whoever else computes.
    # `python -m tests.server.planned_speed` compares by the clock on the wall, with all threads.
    models = {"stet-tales": "stet-tales", "llama": str(llama)}
    missed = [(name, mode, sequences) for name in models for mode in ("none", "w8a8") for sequences in (1, 8)]
    engines = engines_of(models, ("none", "w8a8"), threads=1)
    nearest: dict[tuple[str, str, int], float] = dict.fromkeys(missed, math.inf)
    for _ in range(6):
        device = measured_device(EngineConfig(device="cpu", threads=1), time.process_time)
        for name, mode, n in missed:
            row = compare(models[name], name, mode, n, device, engines[name, mode], time.process_time)
            ratio = row.predicted / row.measured
            nearest[name, mode, n] = min(nearest[name, mode, n], ratio, key=lambda r: abs(math.log(r)))
        missed = [case for case in missed if not 0.8 <= nearest[case] <= 1.2]
        if not missed:
            return
    off = ", ".join(f"{name} {mode} x {n}: {nearest[name, mode, n]:.2f}" for name, mode, n in missed)
    if all(1 / 1.5 <= nearest[case] <= 1.5 for case in missed):
        pytest.xfail(f"predicted over measured, six times: {off}; not within a fifth on this machine at present")
    pytest.fail(f"predicted over measured, six times: {off}")


# Training


def hf_llama(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")}
    return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_training_takes_what_torch_allocates(precision: Any) -> None:
    config = {**LLAMA, "hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 1000, "intermediate_size": 256}
    config |= {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ours = ModelConfig.from_hf(config)
    planned = next(each for each in training_memory(ours, 1, batch=2, context=128) if each.precision == precision.name)
    model = hf_llama(config)
    masters = [parameter.detach().clone() for parameter in model.parameters()] if precision is BFLOAT16 else None
    if precision is BFLOAT16:
        model = model.bfloat16()
    parameters = list(model.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept.setdefault(address, tensor)  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert planned.activations == pytest.approx(activations, rel=0.02)

    loss.backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimized = parameters
    if masters is not None:
        optimized = [torch.nn.Parameter(master) for master in masters]
        for master, gradient in zip(optimized, gradients, strict=True):
            master.grad = gradient.float()
    optimizer = torch.optim.Adam(optimized)
    optimizer.step()
    moments = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    copies = [] if masters is None else optimized
    assert planned.parameters == sum(parameter.nbytes for parameter in parameters)
    assert planned.gradients == sum(gradient.nbytes for gradient in gradients)
    assert planned.optimizer == sum(tensor.nbytes for tensor in [*moments, *copies])
    if precision is FLOAT32:
        assert planned.textbook == (4 + 20) * ours.num_parameters


def test_sharding_divides_the_state_and_nothing_else() -> None:
    config = config_of_count(10**9)
    plans = {(each.precision, each.sharding): each for each in training_memory(config, 7, 3, 500)}
    for precision in (FLOAT32, BFLOAT16):
        alone, ddp, fsdp = (plans[precision.name, sharding] for sharding in ("none", "DDP", "FSDP"))
        assert replace(ddp, sharding="none", devices=1) == alone
        for part in ("parameters", "gradients", "optimizer"):
            assert getattr(alone, part) <= 7 * getattr(fsdp, part) < getattr(alone, part) * 1.000001
        assert fsdp.activations == alone.activations == activation_bytes(config, precision, 3, 500)
        assert 0 < fsdp.gathered < alone.parameters


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "-5"], "'-5' is not an integer from 1"),
        (["--context", "0"], "'0' is not an integer from 1"),
        (["--context", "99999999999999999999"], "is not an integer from 1"),
        (["stet-tales", "--context", "1025"], "exceeds the 1024 positions"),
        (["--concurrency", "two"], "'two' is not an integer from 1 to 4096"),
        (["--memory", "0"], "'0' is not a size above 0"),
        (["--memory", "lots"], "'lots' is not a size such as 2GiB"),
        (["--device", "tpu"], "'tpu' is not one of auto, cpu, cuda, a100-40gb"),
        (["--quantization", "w4"], "'w4' is not one of none, w8a16, w8a8"),
        (["--train-devices", "0"], "'0' is not an integer from 1"),
        (["0b"], "'0b' is not a number of parameters from 1M to 10T"),
        (["99t"], "'99t' is not a number of parameters"),
        (["{folder}/no/such"], "there is no folder"),
        (["{folder}"], "has no config.json"),
        (["{folder}/unknown"], "architecture 'MambaForCausalLM' is not supported"),
        (["{folder}/broken"], "is not valid JSON"),
        (["{folder}/huge"], "parameters; up to 1e+15 are planned for"),
        (["no-such-org/no-such-model", "--offline"], "downloads are off"),
        (["70b", "--device", "l4-24gb"], "are missing. What would help: "),
        (["8b", "--device", "l4-24gb", "--quantization", "none", "--memory", "10GB"], "--quantization w8a16 (saves"),
    ],
)
def test_nonsense_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (
        ("unknown", json.dumps({"architectures": ["MambaForCausalLM"]})),
        ("broken", "{"),
        ("huge", json.dumps({**LLAMA, "hidden_size": 2**30, "num_hidden_layers": 9999})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    given = [argument.format(folder=tmp_path) for argument in arguments]
    if "--device" not in given:
        given += ["--device", "h100-80gb"]
    try:
        code: object = main(["plan", *given])
    except SystemExit as stopped:
        code = stopped.code
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in error
    assert error.startswith("stet")
    assert error.count("\n") == 1


def test_table_and_json_say_the_same_without_torch(tmp_path: Path) -> None:
    def stet(*arguments: str) -> str:
        code = (
            "import sys\nfrom server.cli import main\ncode = main(sys.argv[1:])\n"
            "assert 'torch' not in sys.modules\nsys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    arguments = ("plan", "8b", "--device", "h100-80gb", "--context", "4096", "--concurrency", "16")
    text, found = stet(*arguments), json.loads(stet(*arguments, "--json"))
    assert found["model"]["assumed_shape"] is True
    assert found["kv_cache"]["bytes_per_token"] == 2 * 2 * 32 * 8 * 128
    assert found["device"]["rates"]["source"] == "published"
    assert "nothing was measured" in text
    for mode in MODES:
        planned = found["quantization"][mode]
        assert f"{planned['weights_bytes'] / GIB:.1f} GiB" in text
        assert f"{planned['speed']['decode_concurrent']['tokens_per_second']:,.0f} tok/s" in text
    none, int8 = (found["quantization"][mode]["weights_bytes"] for mode in ("none", "w8a8"))
    assert none / int8 == pytest.approx(2, rel=0.02)
    assert len(found["training"]) == 2
    assert max(len(line) for line in text.splitlines()) <= 140


def test_an_int8_checkpoint_has_no_unquantized_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = write_quantization("w8a16", [], embedding=True)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": stored}))
    arguments = ["plan", str(tmp_path), "--device", "h100-80gb"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (list(found["quantization"]), found["unavailable"]) == (["w8a16", "w8a8"], ["none"])
    assert main([*arguments, "--quantization", "none"]) == 2
    assert "not to be had on an int8 checkpoint: choose one of w8a16, w8a8" in capsys.readouterr().err


def test_cards_are_named_where_no_planner_is_imported() -> None:
    assert tuple(CARDS) == CARD_NAMES


# This machine's device


def test_what_the_child_finds_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalDevice("cpu")
    assert local.known() is None
    found = local.load(measure=False)
    assert found.backend == describe(make_device(EngineConfig(device="cpu")))
    assert found.rates is None
    assert 0 < found.process_bytes < 2 * GIB
    assert len(list(own_cache.iterdir())) == 1

    ran: list[Any] = []

    def run(*arguments: Any, **_: Any) -> Any:
        ran.append(arguments)
        return subprocess.CompletedProcess([], 2, "", "no such device\n")

    monkeypatch.setattr(planned_device.subprocess, "run", run)
    assert local.load(measure=False) == found
    assert not ran
    for asks_again in (
        lambda: local.load(measure=True),
        lambda: local.load(measure=False, again=True),
        lambda: LocalDevice("cpu", "float32").load(measure=False),
    ):
        with pytest.raises(PlanError, match="no such device"):
            asks_again()
    local.path.write_text("{}")
    with pytest.raises(PlanError, match="no such device"):
        local.load(measure=False)
    assert len(ran) == 4


def test_a_device_that_is_not_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "server.cli", "plan", "--device", "cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch sees no NVIDIA GPU here" in done.stderr.splitlines()[-1]


def test_a_configuration_given_inline_is_read_as_a_file_is() -> None:
    sent = json.loads((BUILT_IN_MODELS["stet-tales"] / "config.json").read_text())
    inline, embedded = (
        as_dict(make_plan(subject, card("h100-80gb"), PlanRequest(), 0))
        for subject in (of_config(sent), find_subject("stet-tales"))
    )
    assert (inline["model"].pop("name"), embedded["model"].pop("name")) == ("config", "stet-tales")
    assert inline == embedded

"""The comparison with peers, without the peers: models, conversion, worker processes, gate, client, order, report."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from loadtests.peers import checkpoints, compare, environment, report
from loadtests.peers.contestants import random_prompts
from loadtests.peers.convert_gguf import gguf_name, interleave_heads, read_bfloat16
from loadtests.peers.stamps import up_to_date
from loadtests.peers.worker import Worker, WorkerError
from loadtests.processes import running_server
from models.loader import save_random_checkpoint

# With tied weights so small a model would repeat its last token, whatever its weights.
TINY = checkpoints.QWEN3_473M | {
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as those under build/peers."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.make_checkpoint(TINY, folder / "hf")
    return folder


@pytest.fixture(scope="module")
def reference(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = start("reference", tiny, tmp_path_factory.mktemp("logs"))
    yield worker
    worker.close()


def start(name: str, folder: Path, logs: Path) -> Worker:
    return Worker(sys.executable, name, folder, logs / f"{name}.log", environment.worker_environment("none"))


# ---- models ----


def test_the_tokenizer_has_every_id_of_the_model_and_its_texts_survive(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "hf" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY["vocab_size"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(TINY["vocab_size"]))
    prompt = checkpoints.text(100, seed=3)
    assert len(prompt.split()) == 100
    ids = tokenizer.encode(prompt).ids
    assert 100 <= len(ids) <= 140
    assert tokenizer.decode(ids) == prompt
    # All but the upper half of the bytes are text by themselves.
    broken = [token for token in range(TINY["vocab_size"]) if "\ufffd" in tokenizer.decode([token])]
    assert len(broken) == 128


def test_what_is_there_is_not_made_again(tiny: Path, tmp_path: Path) -> None:
    before = (tiny / "hf" / "model.safetensors").stat().st_mtime_ns
    checkpoints.make_checkpoint(TINY, tiny / "hf")
    assert (tiny / "hf" / "model.safetensors").stat().st_mtime_ns == before

    with pytest.raises(OSError, match="full"), up_to_date(tmp_path, {"a": 1}) as fresh:  # noqa: PT012
        assert not fresh
        raise OSError("the disk is full")
    for inputs, expected in (({"a": 1}, False), ({"a": 1}, True), ({"a": 2}, False), ({"a": 1}, False)):
        with up_to_date(tmp_path, inputs) as fresh:
            assert fresh is expected


# ---- conversion ----


def test_every_tensor_of_both_models_has_a_name_of_its_own_in_gguf(tiny: Path) -> None:
    names = [name for name, _ in read_bfloat16(tiny / "hf" / "model.safetensors")]
    assert "model.layers.1.self_attn.q_norm.weight" in names
    found = [gguf_name(name) for name in names]
    assert len(set(found)) == len(found)
    assert gguf_name("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    with pytest.raises(ValueError, match="rotary"):
        gguf_name("model.layers.0.rotary_emb.inv_freq")


def test_tensors_are_read_to_the_bit(tiny: Path) -> None:
    from safetensors.torch import load_file

    expected = load_file(tiny / "hf" / "model.safetensors")
    read = dict(read_bfloat16(tiny / "hf" / "model.safetensors"))
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor.float().numpy())


def test_attention_scores_survive_the_reordering_of_heads() -> None:
    """q·k of the halves rotated in the original order is q·k of neighbours rotated in the new one."""
    generator = np.random.default_rng(0)
    num_heads, head_dim, hidden = 3, 8, 5
    q_weight, k_weight = generator.normal(size=(2, num_heads * head_dim, hidden))
    x, y = generator.normal(size=(2, hidden))
    angles = {position: position / 100.0 ** (np.arange(head_dim // 2) / (head_dim // 2)) for position in (3, 17)}

    def halves(vector: np.ndarray, position: int) -> np.ndarray:
        cos, sin = np.cos(angles[position]), np.sin(angles[position])
        a, b = vector[..., : head_dim // 2], vector[..., head_dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def neighbours(vector: np.ndarray, position: int) -> np.ndarray:
        cos, sin = np.cos(angles[position]), np.sin(angles[position])
        a, b = vector[..., 0::2], vector[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(vector.shape)

    def heads(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
        return (weight @ value).reshape(num_heads, head_dim)

    expected = (halves(heads(q_weight, x), 17) * halves(heads(k_weight, y), 3)).sum(-1)
    q_new, k_new = interleave_heads(q_weight, num_heads), interleave_heads(k_weight, num_heads)
    found = (neighbours(heads(q_new, x), 17) * neighbours(heads(k_new, y), 3)).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# ---- contestants ----


def test_the_engine_passes_the_gate_and_another_model_does_not(tiny: Path, reference: Worker, tmp_path: Path) -> None:
    prompts = random_prompts(compare.GATE_PROMPTS, 24, seed=1)
    worker = start("stet", tiny, tmp_path)
    try:
        passed, shares = compare.passes_gate(reference.ranks(prompts, worker.generate(prompts, 4)))
        assert passed
        assert shares["top_1"] >= 0.9
        (prefill, _), (decode, host) = worker.measure([("prefill", 1), ("decode", 4)], seed=5)
        assert min(prefill, decode) > 0
        assert host is not None
        assert 0 < host < 4 / decode, "a part of a step"
    finally:
        worker.close()

    save_random_checkpoint(TINY, tmp_path / "hf", seed=1)
    other = start("transformers", tmp_path, tmp_path)
    try:
        passed, shares = compare.passes_gate(reference.ranks(prompts, other.generate(prompts, 4)))
    finally:
        other.close()
    assert not passed
    assert shares["top_10"] < 0.1


def test_a_contestant_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^ctranslate2: ModuleNotFoundError: No module named 'ctranslate2'; see "):
        start("ctranslate2", tmp_path, tmp_path)


def test_a_peer_that_cannot_be_installed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    log = tmp_path / "install.log"
    code = "import sys; print('ERROR: no wheel for this processor'); print('a hint'); sys.exit(1)"
    with pytest.raises(environment.PeerUnavailable, match=r"failed: ERROR: no wheel for this processor \(see install"):
        environment.call([sys.executable, "-c", code], log)
    with pytest.raises(environment.PeerUnavailable, match="no-such-compiler is not on this machine"):
        environment.call(["no-such-compiler"], log)


# ---- over HTTP ----


def test_the_client_counts_tokens_and_the_time_to_the_first(tiny: Path) -> None:
    with running_server([str(tiny / "hf"), "--threads", "1", "--kv-cache-memory", "64MiB"]) as server:
        server.wait_ready()
        answer = compare.ask(server.url, clients=3, requests=2, seed=1)
        with pytest.raises(RuntimeError, match=r"the client failed: .*neither /info nor /v1/models"):
            compare.ask(f"{server.url}/elsewhere", clients=1, requests=1, seed=1)
    assert answer["tokens"] == 3 * 2 * compare.HTTP_TOKENS
    assert len(answer["first"]) == 6
    assert 0 < min(answer["first"]) <= max(answer["first"]) < answer["seconds"]


# ---- order and report ----


def test_rounds_run_forward_and_back_and_share_the_long_cells_evenly() -> None:
    order = compare.visits(["a", "b", "c"], rounds=2)
    assert "".join(visit.name for visit in order) == "abccba" * 2
    assert [visit.number for visit in order] == list(range(12))
    assert "".join(visit.name for visit in order if visit.long) == "abc" + "cba"
    slow = compare.visits(["a", "b", "c"], rounds=3, followers=["b"])
    assert "".join(visit.name for visit in slow) == "abcca" + "accba" + "abcca"
    assert [visit.name for visit in slow if visit.long].count("b") == 1
    assert set(compare.SHORT_CELLS) | set(compare.LONG_CELLS) == set(compare.CELLS)


def test_the_table_names_the_best_peer_and_keeps_who_has_no_number() -> None:
    entries = {
        "stet": compare.Entry(
            samples={("decode", 1): [30.0, 33.0, 30.0], ("decode", 32): [400.0]}, host={("decode", 32): [0.002]}
        ),
        "slow": compare.Entry(samples={("decode", 1): [10.0, 11.0], ("decode", 32): [500.0]}),
        "fast": compare.Entry(samples={("decode", 1): [20.0, 20.0]}, left_out="it broke off"),
    }
    rows = {row["tokens/s"]: row for row in report.engine_rows("m", entries)}
    single = rows["decode, batch 1"]
    assert (single["stet"], single["best peer"], single["stet / best"]) == ("30 ± 5 %", "fast", "1.50")
    assert rows["decode, batch 32"]["best peer"] == "slow"
    assert rows["decode, batch 32"]["stet / best"] == "0.80"
    assert rows["Python's part of a step, ms, decode, batch 32"]["stet"] == "2"
    lines = report.table(list(rows.values())).splitlines()
    assert lines[0] == "| model | tokens/s | stet | slow | fast | best peer | stet / best |"
    assert "| m | decode, batch 32 | 400 | 500 | – | slow | 0.80 |" in lines

    http = {
        "stet": compare.HttpEntry(ready=[3.0, 2.0], rates={1: [50.0]}, first={1: [0.1]}),
        "peer": compare.HttpEntry(ready=[90.0, 60.0], rates={1: [40.0]}, first={1: [0.4]}),
    }
    found = {row["over HTTP"]: row["stet / best"] for row in report.http_rows("m", http) if "stet" in row}
    assert found["tokens/s, 1 clients"] == "1.25"
    assert found["median TTFT, ms, 1 clients"] == "0.25"
    assert found["ready after, s, second start"] == "0.03"


def test_the_stalls_are_drawn_where_their_values_say() -> None:
    from loadtests.peers import stall

    found = {
        name: stall.Stall(int(name), [1.0], [ratio], [first])
        for name, first, ratio in (("16", 1.0, 8.0), ("32", 2.0, 4.0), ("64", 4.0, 2.0))
    }
    root = ElementTree.fromstring(stall.plot(found, "a < b"))
    name = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{name}circle")]
    assert circles[1][0] - circles[0][0] == pytest.approx(circles[2][0] - circles[1][0], abs=0.2)  # both doubled
    assert circles[0][1] < circles[1][1] < circles[2][1]  # higher values stand higher
    assert {"16", "64", "aim: 3"} < {text.text for text in root.iter(f"{name}text")}


def test_the_saturation_is_drawn_from_its_cells() -> None:
    from loadtests import saturation

    result = json.loads((saturation.RESULTS / "2026-11-24-saturation.json").read_text())
    cells = result["cells"]
    root = ElementTree.fromstring(saturation.plot(cells, ["a note"]))
    # Throughput, and median and 99th percentile of two times.
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 5 * len(cells)
    page = (saturation.RESULTS / "2026-11-24-saturation.md").read_text()
    assert all(" | ".join(map(str, saturation.row(cell).values())) in page for cell in cells)
    failed = cells[0] | {"latency_s": {key: {"count": 0} for key in ("ttft", "inter_token")}}
    assert saturation.row(failed)["TTFT ms, p50 / p99"] == "–"
    assert saturation.plot([failed], [])


def test_streams_are_timed_beside_a_long_prompt(tiny: Path) -> None:
    from loadtests.peers import stall
    from server.engine.build import build_engine
    from server.engine.config import EngineConfig

    engine = build_engine(EngineConfig(model=str(tiny / "hf"), threads=1, kv_cache_bytes=1 << 26, mixed_step_tokens=64))
    found = []
    for seed in (1, 2, 3):  # what else the machine does may lengthen any of these times
        alone, p99, first = stall.measure(engine.core, seed=seed, long_prompt=400)
        assert not engine.core.has_work
        assert alone > 0
        # Seven chunks of 64 tokens, each in a step of its own, and the 99th percentile is one of those steps.
        found.append((first > 6 * alone, alone < p99 < first))
    assert (True, True) in found

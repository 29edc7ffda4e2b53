"""The benchmarks of the CUDA backend: the whole protocol on tiny shapes, the timer against a GPU made of counters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.bench import cuda, peers, report, sweep
from kernels.bench import timing as timing_module
from kernels.bench.__main__ import main
from kernels.bench.case import Aim, Case, Probes, Row, Spec, difference, measure, poisoned, verdict
from kernels.bench.cases import all_specs
from kernels.bench.experiments import compared
from kernels.bench.timing import CudaTimer, HostTimer, Sample, Spread, interleaved
from kernels.bench.workload import FULL, SMOKE, block_tables
from kernels.cuda import activation

PROBES = Probes(bandwidth=1e9, rate=1e12)


@pytest.mark.usefixtures("one_thread")
def test_the_whole_protocol_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cuda.run(smoke=True, save="result", folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [row for row in result["kernels"] if row["failure"]] == []
    assert [answer for answer in result["experiments"] if answer["ours"] and not answer["equal"]] == []
    assert code == 0
    assert {row["op"] for row in result["kernels"]} == {
        *("decode", "prefill", "linear none", "linear w8a16", "linear w8a8"),
        *("add_rms_norm", "silu_mul", "write_kv", "sample"),
    }
    assert all(row["median_us"] > 0 and row["floor_us"] > 0 for row in result["kernels"])
    # A peer was timed or is named with its reason.
    found = {name: value for row in result["kernels"] for name, value in row["peers"].items()}
    assert found.keys() == {
        *("sdpa flash", "sdpa cudnn", "sdpa default", "flashinfer", "cublas", "torchao", "gemlite", "torch")
    }
    assert len(result["experiments"]) == 8
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "result.md").read_text().splitlines() == lines[:-1]


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = activation.gated
    monkeypatch.setattr(activation, "gated", lambda x, *rest: torch.as_tensor(right(x, *rest)) * 1.02)
    monkeypatch.setattr(cuda, "probe", lambda *_: (PROBES, {}))
    assert main(["--smoke", "--only", "silu"]) == 1
    out = capsys.readouterr().out
    (row,) = json.loads(out.splitlines()[-1])["kernels"]
    assert row["failure"].startswith("error 0.02")
    assert row["median_us"] == 0
    assert "FAIL" in out


def test_what_the_time_does_not_allow_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "probe", lambda *_: (PROBES, {}))
    assert main(["--smoke", "--only", "sample", "--seconds", "-1"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["skipped"] == ["sample, k=50 p=0.9 B=1 V=300", "sample, greedy B=1 V=300"]
    assert "Skipped, the time was over: sample, greedy B=1 V=300" in out


@pytest.mark.usefixtures("one_thread")
def test_the_sweep_runs_and_marks_the_tile_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU a candidate may not fit; the sweep says so")
    assert sweep.main(["--smoke", "--op", "linear_w8a16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = json.loads(lines[-1])["sweep"]
    assert all("problem" not in entry for entry in entries)
    for rows in SMOKE.rows:
        assert sum(entry["now"] for entry in entries if entry["rows"] == rows) == 1
    assert sum("<- now" in line for line in lines[:-1]) == len(SMOKE.rows)


def test_a_raising_operator_fails_alone() -> None:
    def build() -> Case:
        raise ImportError("no such kernel\nat all")

    row = cuda.attempt(Spec("op", "shape", build), HostTimer(), PROBES, 1)
    assert row.failure == "ImportError: no such kernel"


def test_the_cases_of_a_gpu_cover_the_aims() -> None:
    specs = list(all_specs(FULL, torch.device("cuda")))  # nothing is built
    assert len({(spec.op, spec.shape) for spec in specs}) == len(specs) == 105
    assert FULL.copies(1 << 30) == 2
    assert FULL.copies(16 << 20) == 16


def test_gate_floor_and_peers() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this device")

    case = Case(
        num_bytes=1000,
        operations=4_000_000,
        ours=[lambda: None],
        error=lambda: 0.0,
        tolerance=0.0,
        peers={"absent": "not installed", "broken": [broken], "fine": [lambda: None]},
        aims=(Aim("ratio", 0.0, "fine"), Aim("ratio", 1.0, "absent")),
        rate_factor=2.0,
    )
    row = measure(Spec("op", "shape", lambda: case), HostTimer(), PROBES, 3)
    assert row.floor_us == pytest.approx(2.0)
    assert row.share == pytest.approx(row.floor_us / row.median_us)
    assert row.peers["absent"] == "not installed"
    assert row.peers["broken"] == "failed: no kernel"
    assert isinstance(row.peers["fine"], float)
    assert [aim["met"] for aim in row.aims] == [True, None]
    text = report.table([row])
    assert "absent: not installed" in text
    assert "no peer" in text


def test_the_gate_sees_nan_and_what_was_not_written() -> None:
    truth = torch.ones(8)
    assert math.isnan(difference(torch.full((8,), math.nan), truth))
    assert difference(truth[:4], truth) == math.inf
    case = Case(1, 0, [lambda: None], lambda: math.nan, 1e9, {})
    assert measure(Spec("op", "shape", lambda: case), HostTimer(), PROBES, 1).failure
    memory = torch.zeros(4)

    def forgets_the_last() -> torch.Tensor:
        memory[:3] = 1
        return memory

    assert poisoned(forgets_the_last).isnan().tolist() == [False, False, False, True]
    assert compared("?", [(torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]))])["differing_share"] == 0.5


def test_attention_of_torch_without_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that refuses grouped heads gets K and V repeated, and is named so; the aims still find it."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def refuses(*tensors: torch.Tensor, is_causal: bool, enable_gqa: bool) -> torch.Tensor:
        if enable_gqa:
            raise RuntimeError("no grouped heads")
        return attention(*tensors, is_causal=is_causal)

    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    truth = attention(query, key, key, is_causal=True, enable_gqa=True)
    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", refuses)
    found = peers.sdpa(query, [(key, key)], causal=True)
    call = found["sdpa default, repeated K and V"][0]
    assert callable(call)
    assert torch.allclose(torch.as_tensor(call()), truth, atol=1e-6)
    row = Row("op", "shape", 0.0, median_us=10.0)
    spreads = {"sdpa default, repeated K and V": Spread(1e-5, 2e-5, 3e-5)}
    assert verdict(Aim("ratio", 1.3, "sdpa default"), row, spreads)["value"] == 2.0


def test_verdicts() -> None:
    row = Row("op", "shape", 0.0, median_us=10.0, share=0.9)
    spreads = {"peer": Spread(1e-5, 2e-5, 3e-5)}
    assert verdict(Aim("share", 0.85), row, spreads) == {"aim": "share >= 0.85", "value": 0.9, "met": True}
    assert verdict(Aim("microseconds", 9.0), row, spreads)["met"] is False
    assert verdict(Aim("ratio", 2.0, "peer"), row, spreads) == {"aim": ">= 2.0x peer", "value": 2.0, "met": True}


def test_blocks_are_scattered_and_used_once() -> None:
    tables = block_tables(3, 33, 16)
    used = [block for table in tables for block in table]
    assert sorted(used) == list(range(9))
    assert used != list(range(9))


def test_ours_and_peers_alternate() -> None:
    order: list[str] = []

    def sample(name: str, values: Iterator[float]) -> Sample:
        def run() -> float:
            order.append(name)
            return next(values)

        return Sample(run)

    spreads = interleaved({"a": sample("a", iter([3.0, 1.0, 2.0])), "b": sample("b", iter([1.0] * 3))}, 3)
    assert "".join(order) == "abbaab"
    assert spreads["a"] == Spread(1.0, 2.0, 3.0)


class FakeCuda:
    """Stands in for torch.cuda: a clock that each call advances by 0.1 ms, and graphs that remember their calls."""

    def __init__(self, refuses: bool) -> None:
        self.clock = 0.0
        self.capturing: list[int] | None = None
        self.refuses = refuses
        self.calls = 0

    def work(self) -> None:
        self.calls += 1
        if self.capturing is None:
            self.clock += 0.1
        elif self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        else:
            self.capturing[0] += 1

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.clock

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def __init__(self) -> None:
                self.captured = [0]

            def replay(self) -> None:
                fake.clock += 0.1 * self.captured[0]

        class Capture:
            def __init__(self, graph: Graph) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                fake.capturing = self.graph.captured

            def __exit__(self, *_: object) -> None:
                fake.capturing = None

        class Stream:
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...
            def wait_stream(self, other: Stream) -> None: ...

        replaced: dict[str, Any] = {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream}
        replaced |= {"stream": lambda s: s, "current_stream": Stream, "synchronize": lambda: None}
        replaced |= {"empty_cache": lambda: None, "current_device": lambda: 0}
        for name, value in replaced.items():
            patch.setattr(timing_module.torch.cuda, name, value)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_timer_of_a_gpu(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(refuses)
    fake.install(monkeypatch)
    timer = CudaTimer()
    sample = timer.prepare([fake.work] * 3)
    assert sample.graphed is not refuses
    begin = fake.clock
    assert sample.run() == pytest.approx(1e-4)
    # 2 ms of calls of 0.1 ms: 20, in whole turns of three copies.
    assert fake.clock - begin == pytest.approx(0.1 * 21)
    timer.release()

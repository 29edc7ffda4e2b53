#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: bash loadtests/on_gpu.sh OUT [SECONDS]
#
# The machine needs python3 with the packages of loadtests/gpu_bench.py, pytest, pytest-xdist, pytest-timeout and
# hypothesis; fastapi, pydantic, uvicorn and prometheus-client too, for the part that serves. First, side by side: the kernels' tests on the
# device, the start of the server with the embedded model, and each measurement once with tiny effort, which compiles its
# kernels. Then, one after the other with the device to itself: the operators, a profile of decode steps, the engine. A part
# that fails or takes too long costs only itself. About SECONDS (420) in all; logs in OUT.
set -u
cd "$(dirname "$0")/.."
mkdir -p "$1"
out=$(cd "$1" && pwd)
total=${2:-420}
side_by_side=$((total * 36 / 100))
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD PYTHONUNBUFFERED=1
say() { echo "[$SECONDS s] $*"; }

nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,clocks.mem --format=csv
# The smallest thing that could fail, before minutes are spent.
timeout 60 python3 -m kernels.bench --device cuda --only silu_mul --rounds 1 --seconds 1 > "$out/first.log" 2>&1 \
  || { tail -c 2000 "$out/first.log"; exit 1; }
say "a kernel runs"

warm() { # NAME COMMAND…: within the first part's time
  local name=$1
  shift
  timeout "$side_by_side" "$@" > "$out/$name.log" 2>&1 &
}
# Other versions of the packages warn of other things than those that the tests were written with.
warm tests python3 -m pytest -q -n 7 -o addopts= -o filterwarnings=default --timeout $((side_by_side - 10)) --tb=short \
  tests/kernels/cuda --ignore tests/kernels/cuda/test_compiled.py tests/kernels/test_experts.py tests/models/test_cuda_backend.py \
  tests/server/engine/test_cuda_runner.py tests/server/engine/test_invariance.py
seconds=$((side_by_side - 30))
for op in decode prefill "linear none" "linear w8a16" "linear w8a8"; do
  warm "warm-${op// /-}" python3 -m kernels.bench --only "$op" --rounds 1 --seconds $seconds
done
warm warm-rest python3 -m kernels.bench --only experiments --only add_rms --only silu --only write_kv --only sample \
  --rounds 1 --seconds $seconds
warm warm-engine python3 -m loadtests.engine_bench --models qwen3-0.6b --batches 1 8 --rounds 1 --new-tokens 16
serve() {
  python3 -c 'import sys; from server.cli import main; sys.exit(main())' serve --device cuda --port 8077 &
  local server=$! body='{"prompt": "Once upon a time", "max_new_tokens": 60, "temperature": 0.8, "seed": 7}'
  for _ in $(seq "$side_by_side"); do curl -sf localhost:8077/readyz > /dev/null && break; sleep 1; done
  for _ in 1 2; do curl -s localhost:8077/generate -H 'Content-Type: application/json' -d "$body"; echo; done
  curl -s localhost:8077/info
  curl -s localhost:8077/metrics | grep -E '^stet_(kernel_fallback|memory_bytes|startup)'
  kill $server
}
export -f serve
export side_by_side
warm serve bash -c serve
wait
say "side by side: over"
tail -n 25 "$out/tests.log"
grep -hE "FAIL|failed|Error" "$out"/warm-*.log | cut -c1-300 | head -20
tail -n 12 "$out/warm-rest.log" | cut -c1-300
tail -c 600 "$out/warm-engine.log"
tail -c 1500 "$out/serve.log"

alone() { # NAME SECONDS COMMAND…
  local name=$1 limit=$2
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  say "$name: over ($?)"
}
alone operators $((total * 33 / 100)) python3 -m kernels.bench --rounds 8 --seconds $((total * 27 / 100))
alone profile $((total * 12 / 100)) python3 -m loadtests.gpu_profile
alone engine $((total * 19 / 100)) python3 -m loadtests.engine_bench --models llama-3.1-8b --batches 1 64 --rounds 1 \
  --new-tokens 48 --seconds $((total * 15 / 100))
tail -c 2500 "$out/engine.log"

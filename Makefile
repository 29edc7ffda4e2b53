# Three commands for daily work: make serve, make test, make check.
# Each makes the virtual environment if it is missing. Pass flags with ARGS="…".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: serve test test-clients check fuzz bench bench-hard bench-peers bench-saturation loadtest soak format clean

# The CPU's kernels: compiled at installation, and again whenever their sources change. A missing compiler costs speed only.
KERNELS := $(VENV)/.kernels
$(KERNELS): $(VENV)/bin/python kernels/cpu/build.py $(wildcard kernels/cpu/csrc/*)
	@$(BIN)/python kernels/cpu/build.py > /dev/null && touch $@ || true

serve: $(VENV)/.serve $(KERNELS)
	@exec $(BIN)/stet serve $(ARGS)

# What only computes shares the machine between two workers; what has deadlines of its own then has it to itself.
COMPUTE := tests/kernels tests/models tests/simulation tests/server/engine tests/end_to_end/test_triton.py
test: $(VENV)/.dev $(KERNELS)
ifeq ($(ARGS),)
	$(BIN)/python -m pytest --durations 10 --numprocesses 2 --dist loadfile $(COMPUTE)
	$(BIN)/python -m pytest --durations 10 $(addprefix --ignore ,$(COMPUTE))
else
	$(BIN)/python -m pytest $(ARGS)
endif

# Clients whose dependencies conflict with those pinned here, in an environment of their own.
CLIENTS := build/clients
test-clients: $(VENV)/.serve $(CLIENTS)/.installed $(KERNELS)
	$(BIN)/python -m tests.clients $(CLIENTS)/bin/python

$(CLIENTS)/.installed: tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --constraint $< litellm langchain-openai
	@touch $@

# 10,000 requests that nobody means well with, against a real server: some minutes.
fuzz: $(VENV)/.dev $(KERNELS)
	$(BIN)/python -m tests.fuzz $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench $(KERNELS)
	$(BIN)/python -m loadtests $(ARGS)

# Clients that leave, do not read, come ten times too many, or flood: what becomes of the server and the others.
bench-hard: $(VENV)/.serve $(KERNELS)
	$(BIN)/python -m loadtests.hard $(ARGS)

# Beside other engines and servers, each in an environment of its own under build/peers: see loadtests/README.md.
bench-peers: $(VENV)/.bench $(KERNELS)
	$(BIN)/python -m loadtests.peers $(ARGS)

# Scenarios of locust against a server of its own: steady, burst, ramp, long, shared, cancels, slow, soak. ARGS=--ui opens its page.
SCENARIO ?= steady
loadtest: $(VENV)/.loadtest $(KERNELS)
	$(BIN)/python -m loadtests.locust $(SCENARIO) $(ARGS)

# Everything at once for an hour, or MINUTES: does memory grow, does anything stay open?
MINUTES ?= 60
soak: $(VENV)/.serve $(KERNELS)
	$(BIN)/python -m loadtests.soak --minutes $(MINUTES) $(ARGS)

# Throughput and latencies against offered load, beside llama.cpp's server: the plot of the README.
bench-saturation: $(VENV)/.bench $(KERNELS)
	$(BIN)/python -m loadtests.saturation $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp for each set of packages; a changed pyproject.toml or constraints.txt installs again.
$(VENV)/bin/python:
	@echo "Making the virtual environment in $(VENV) (once; torch is large)…"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.serve

$(VENV)/.bench: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@ $(VENV)/.serve

$(VENV)/.loadtest: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[loadtest]'
	@touch $@ $(VENV)/.serve

# Everything runs from .venv, made on first use and reused afterwards, with the exact versions of constraints.txt.
# PYTHON chooses the interpreter that makes it: make test PYTHON=python3.12
# TORCH chooses PyTorch's build: cpu, cuda, or any (whatever pip finds). The default is cuda where there is an NVIDIA
# GPU, and cpu elsewhere: make test TORCH=cuda

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= $(shell command -v nvidia-smi > /dev/null && echo cuda || echo cpu)
LOCK   := constraints.txt
INDEX_cpu  := --index-url https://download.pytorch.org/whl/cpu
INDEX_cuda :=
INDEX_any  :=
# Two processes share the tests, a file at a time and in the order that tests/conftest.py gives.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lab notebooks bench soak fuzz lock canary clean

demo: $(VENV)/.base
	$(BIN)/labkit demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(VENV)/.dev
	$(BIN)/labkit lab $(LAB_ARGS)

notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

bench: $(VENV)/.base
	$(BIN)/labkit bench scheduler $(BENCH_ARGS)

# The server under thousands of requests and a crowd of clients, and what they leave behind.
soak: $(VENV)/.dev
	$(BIN)/python tools/soak_server.py $(SOAK_ARGS)

# The server under requests that Schemathesis makes from /openapi.json, in an environment of its own.
fuzz: $(VENV)/.dev
	@test -x .fuzz/bin/st || { $(PYTHON) -m venv .fuzz && .fuzz/bin/python -m pip install --quiet 'schemathesis>=4,<5'; }
	$(BIN)/python tools/fuzz_server.py --st .fuzz/bin/st $(FUZZ_ARGS)

# The newest versions that pyproject.toml allows, into constraints.txt.
lock: | $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python tools/lock.py

# The suite on the newest versions that pyproject.toml allows (BEYOND=1: that exist), and what fails, by package.
canary:
	$(PYTHON) -m venv .canary
	.canary/bin/python -m pip install --quiet torch==$(shell sed -n 's/^torch==//p' $(LOCK)) $(INDEX_$(TORCH))
	.canary/bin/python tools/canary.py $(if $(BEYOND),--beyond) $(SIDE_BY_SIDE) $(CANARY_ARGS)

clean:
	rm -rf $(VENV) .canary .fuzz .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	    || { echo "labkit needs Python 3.11 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25'  # an older one takes three times as long to find what it installs

# PyTorch first, from its own index; then labkit, for which it is there already.
$(VENV)/.torch: $(LOCK) | $(BIN)/python
	@test -n "$(filter $(TORCH),cpu cuda any)" || { echo "TORCH is cpu, cuda or any, not '$(TORCH)'"; exit 1; }
	$(BIN)/python -m pip install --quiet $$(sed -n 's/^torch==/torch==/p' $(LOCK)) $(INDEX_$(TORCH))
	@touch $@

$(VENV)/.base: pyproject.toml $(LOCK) $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(LOCK) $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --editable '.[dev]'
	@touch $(VENV)/.base $@

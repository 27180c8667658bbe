# Targets set up what they need: a virtual environment in .venv, pinned by constraints.txt.
.PHONY: setup demo test bench bench-gpu check test-comfy test-e2e format
.DEFAULT_GOAL := test

export HF_HUB_OFFLINE := 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(BIN)/python
PYTEST := $(BIN)/python -m pytest -rs --timeout=600

setup: $(STAMP)

# Images in demo/, the contact sheet first.
demo: setup
	$(BIN)/python -m dreamcache_core demo --out demo

# The first half on all cores; ComfyUI and the browser keep them busy by themselves.
test: setup
	$(PYTEST) -n auto --dist worksteal tests --ignore tests/nodes --ignore tests/e2e
	$(PYTEST) tests/nodes tests/e2e

# What generation costs, against bounds and against the same job written plainly; about 20 minutes on two idle cores.
bench: setup
	$(BIN)/python -m benchmarks all --out bench

# What docs/performance.md leaves open, on a CUDA device, in ten minutes at most. PYTHON=python3 takes an environment
# that is there, with a torch of its own, and sets up none.
bench-gpu: $(if $(filter $(BIN)/python,$(PYTHON)),setup)
	$(PYTHON) -m benchmarks gpu --out bench/gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -q -m "not slow and not diffusers" tests --ignore tests/nodes --ignore tests/e2e

test-comfy: setup
	$(PYTEST) tests/nodes

test-e2e: setup
	$(PYTEST) tests/e2e

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,dev]'
	touch $@

# The first interpreter that is new enough and has the modules which build an environment.
$(BIN)/python:
	@for python in python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "Python 3.11 or newer with the venv module is needed (Debian: python3-venv);" \
	  "python3 here is: $$(python3 --version 2>&1)." >&2; \
	exit 1

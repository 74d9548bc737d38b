# Everything runs from here on a machine that has Python >= 3.10, pip and a C++ compiler. The first call sets up .venv;
# later calls find it done.
#
#   make demo TORCH="torch==2.12.1"    another torch (>= 2.11); an environment that already has one keeps it
#   make test ARGS="-k cache -x"       arguments for pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Bytecode is written at the first import instead, for the modules that are used; a shell that forbids it would have every
# process compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install --quiet --no-compile
CONSTRAINTS := $(VENV)/constraints.txt
READY := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')

# The oldest diffusers and transformers, with the huggingface-hub, HTTP client, tokenizers and torchao that they take. Before
# 5.6, transformers gives text encoders that a newer one saved random weights (CLIP lost its prefix `text_model.`).
OLDEST := diffusers==0.36.0 transformers==5.6.2 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 tokenizers==0.22.2 \
  torchao==0.15.0
NEWEST_TRITON := triton==3.9.0
# Both workers share the cores: one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=10
DIFFUSERS_TESTS := tests/test_cli.py tests/test_quality.py tests/test_toy.py $(wildcard tests/test_diffusers_*.py)
TRITON_TESTS := $(wildcard tests/test_triton_*.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-oldest test-triton-newest lint format types bench wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with torch, diffusers, the tools, and this package (editable)

demo: $(READY)  ## generate the demo's videos, pictures and table
	$(BIN)/para-kernels demo $(ARGS)

test: $(READY)  ## run all tests (ARGS="..." goes to pytest)
	$(PYTEST) $(ARGS)

test-oldest: $(READY) .venv-oldest/.installed  ## run the diffusers tests against the oldest supported diffusers
	$(call check_overlay,.venv-oldest,$(OLDEST))
	PYTHONPATH=.venv-oldest $(PYTEST) $(DIFFUSERS_TESTS) $(ARGS)

test-triton-newest: $(READY) .venv-triton-newest/.installed  ## run the Triton tests under the newest Triton
	$(call check_overlay,.venv-triton-newest,$(NEWEST_TRITON))
	PYTHONPATH=.venv-triton-newest $(PYTEST) $(TRITON_TESTS) $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## pyright
	$(BIN)/pyright

bench: $(READY)  ## micro-benchmarks of the ops; records go to benchmarks/results
	$(BIN)/python -m pytest $(wildcard benchmarks/bench_*.py) $(ARGS)

wheel: $(READY)  ## build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:  ## remove builds and caches; the environments stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------------------------------------

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and is then pinned, so that nothing installed later can replace it. The same goes for Triton: torch's
# CUDA wheels bring the one they need.
$(CONSTRAINTS): | $(BIN)/python
	$(BIN)/python -c 'import torch; assert torch.__version__ >= "2.11"' 2>/dev/null || $(INSTALL) '$(TORCH)'
	$(INSTALL) 'setuptools>=77' wheel ninja
	$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) '$(TRITON)' || echo 'No $(TRITON) for this machine: going on without.'
	$(PIP) freeze | grep -E '^(torch|triton)==' > $@

$(READY): $(BUILD_INPUTS) | $(CONSTRAINTS)
	$(INSTALL) --no-build-isolation --constraint $(CONSTRAINTS) --editable '.[diffusers,dev]'
	touch $@

# An overlay is a folder that stands before .venv on the path, holding only what differs.
define overlay
rm -rf $(1)
$(INSTALL) --no-deps --target $(1) $(2)
touch $(1)/.installed
endef

.venv-oldest/.installed: Makefile | $(READY)
	$(call overlay,.venv-oldest,$(OLDEST))

.venv-triton-newest/.installed: Makefile | $(READY)
	$(call overlay,.venv-triton-newest,$(NEWEST_TRITON))

# The first of the overlay's packages is the one that is imported.
define check_overlay
PYTHONPATH=$(1) $(BIN)/python -c 'import sys; from importlib import import_module as get; \
  name, version = sys.argv[1].split("=="); module = get(name); \
  sys.exit(None if module.__version__ == version else f"{module} is {module.__version__}, wanted {version}")' $(firstword $(2))
endef

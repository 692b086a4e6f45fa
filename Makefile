# Commands for people and CI. Everything is installed into .venv, on first use.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install format check test test-fast test-spark test-slurm test-kill demo bench-data bench-train bench-checkpoint bench-runs lock clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## install tundish and its locked dependencies into .venv (8 GB)

# Versions and hashes come from the lock file; nothing is resolved. Compiling the bytecode now halves the time that
# importing Composer takes, in every process of every run.
$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is required and was not found. Install it, or name one: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep -oE '^uv==[0-9.]+' requirements.lock)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $(INSTALLED)

format: $(INSTALLED)  ## format the code and sort its imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only --quiet .

check: $(INSTALLED)  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

test: $(INSTALLED)  ## run the tests (CPU, no network)
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)  ## run only the tests that train nothing (1.5 minutes)
	$(BIN)/python -m pytest -m "not slow and not spark and not slurm and not kill"

test-spark: $(INSTALLED)  ## run the tests that need a local Spark cluster (Java)
	$(BIN)/python -m pytest -m spark

test-slurm: $(INSTALLED)  ## run the tests that need Slurm or two hosts, set up on this machine (root; slurm-wlm, munge, iproute2)
	$(BIN)/python -m pytest -s -m slurm

test-kill: $(INSTALLED)  ## run the tests that kill runs at any moment or start twenty at once (45 minutes)
	$(BIN)/python -m pytest -s -m kill

demo: $(INSTALLED)  ## train a tiny model on this machine and test what it learned (2 minutes)
	$(BIN)/python recipes/demo.py

bench-data: $(INSTALLED)  ## measure data preparation against LLM Foundry (15 minutes; OPTIONS="--only 1,3")
	$(BIN)/python -m benchmarks.data $(OPTIONS)

bench-train: $(INSTALLED)  ## measure training against a bare PyTorch loop and LLM Foundry (15 minutes)
	$(BIN)/python -m benchmarks.train $(OPTIONS)

bench-checkpoint: $(INSTALLED)  ## measure saving and exporting checkpoints (20 minutes, 24 GB of disk)
	$(BIN)/python -m benchmarks.checkpoint $(OPTIONS)

bench-runs: $(INSTALLED)  ## measure starting, listing, accepting and supervising runs (6 minutes)
	$(BIN)/python -m benchmarks.runs $(OPTIONS)

lock: $(INSTALLED)  ## resolve the dependencies again
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --extra spark --group dev pyproject.toml --output-file requirements.lock

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache dist build

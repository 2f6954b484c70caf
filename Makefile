# Every target installs what it needs into .venv first. PYTHON is the interpreter that .venv is made from: 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
REAL_MODEL := .cache/qwen2.5-coder-0.5b-instruct

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv extract test lint real bench torture test-gpu clean

help:  ## Lists the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(VENV)/.project  ## Makes .venv with the pinned requirements; does nothing while they stay the same.

$(VENV)/.requirements: requirements/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	    "Python 3.11 or 3.12 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) -r requirements/cpu.txt
	touch $@

$(VENV)/.project: $(VENV)/.requirements setup.py
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

extract: venv  ## Hidden states of the embedded text from the embedded model, into out/demo.
	$(BIN)/nemo-qwen-hidden extract store.path=out/demo store.overwrite=true

test: lint  ## Lint, then every test that needs neither real weights nor a GPU.
	$(BIN)/python -m pytest

lint: venv  ## ruff, mypy and the import contract.
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

real: venv  ## Real Qwen2.5 weights (or the folder in NQH_REAL_MODEL): a run over the standard library's json, and tests.
	model=$$($(BIN)/python recipes/real_weights/fetch.py $(REAL_MODEL) | tail -n 1); \
	sources=$$($(BIN)/python -c 'import json, os; print(os.path.dirname(json.__file__))'); \
	$(BIN)/nemo-qwen-hidden extract model.path="$$model" data.path="$$sources/**/*.py" \
	    store.path=out/real store.overwrite=true; \
	NQH_REAL_MODEL="$$model" $(BIN)/python -m pytest -m real -raP

bench: venv  ## extract against other ways and the floor of matrix products (hours; BENCH_FP32, BENCH_BF16, BENCH_ROUNDS).
	model=$$($(BIN)/python recipes/real_weights/fetch.py $(REAL_MODEL) | tail -n 1); \
	run() { $(BIN)/python -m benchmarks.extraction --model "$$model" --rounds $(or $(BENCH_ROUNDS),3) "$$@"; }; \
	run --dtype fp32 --tokens $(or $(BENCH_FP32),12000) --json out/bench/ragged-fp32.json; \
	run --dtype bf16 --tokens $(or $(BENCH_BF16),6000) --json out/bench/ragged-bf16.json; \
	for length in 512 2048; do \
	    run --dtype bf16 --equal $$length --cases middle --tokens 4096 --json out/bench/equal-$$length-bf16.json; \
	done
	$(BIN)/python -m benchmarks.report out/bench/*.json --plot out/bench/extraction.png

torture: venv  ## Kills runs KILLS times (100), at moments that SEED (1) chooses, and checks every promise of the store.
	$(BIN)/python -m tests.torture.every_call --seed $(or $(SEED),1)
	$(BIN)/python -m tests.torture --kills $(or $(KILLS),100) --seed $(or $(SEED),1)

test-gpu: venv  ## Tests that need a CUDA device.
	$(BIN)/python -m pytest -m gpu

clean:  ## Takes away .venv, outputs and caches; real weights in .cache stay.
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

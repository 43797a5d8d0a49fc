# `make demo` and `make test` do all their own set-up: Python 3.11 or newer, its headers and a C++ compiler are enough.

PYTHON ?= python3
# The version this project is tested with. For another CUDA: make setup TORCH="torch --index-url ...".
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Files of tests that go side by side: ranks wait for each other half of the time.
WORKERS ?= 2

export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: help setup demo test check bench docs clean

help:
	@echo "make setup  .venv with everything that is needed"
	@echo "make demo   train one network on the Python standard library and take a small one out (10 minutes)"
	@echo "make test   every test"
	@echo "make check  lint, format and types"
	@echo "make docs   the site of docs/, in build/docs"
	@echo "make bench  the parity, communication, memory, time, compile, exactness and checkpoint tables"

setup: .venv/.complete

.venv/.complete: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.communication
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.compile
	$(BIN)/python -m benchmarks.exactness
	$(BIN)/python -m benchmarks.saving
	$(BIN)/python -m benchmarks.elastic

# Warnings are errors: a broken link between pages ends the build.
docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/python -m sphinx -b html -W --keep-going --quiet docs build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf demo .cache build dist *.egg-info

# `make demo` and `make test` do all their own set-up. They need Python 3.11 or newer, its headers and a C++ compiler.

PYTHON ?= python3
# The version this project is tested with. For another CUDA: make setup TORCH="torch --index-url ...".
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Files of tests that run side by side: ranks wait for each other half of the time.
WORKERS ?= 2
# What `make test-all` runs: names that contain one of these words. All if empty.
NAMES ?=
# Minutes of `make test-all` for the sample of the exactness matrix.
MINUTES ?= 45

export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: help setup demo test test-all check bench docs clean

help:
	@echo "make setup     makes .venv with everything that is needed"
	@echo "make demo      trains one network on the Python standard library and exports a small one (10 minutes)"
	@echo "make check     checks lint, format and types"
	@echo "make test      runs the first tier of tests (at most 12 minutes on two cores)"
	@echo "make test-all  runs the second tier by name (at most 90 minutes) and goes on after a stop:"
	@echo "               NAMES=\"slurm matrix\" runs these names only, MINUTES=5 shortens the sample of the matrix,"
	@echo "               RECORD=1 adds the result to docs/benchmarks.md. Needs tests/cluster/install.sh, as root"
	@echo "make docs      builds the site of docs/ in build/docs"
	@echo "make bench     prints the parity, communication, memory, time, compile, exactness and checkpoint tables"

setup: .venv/.complete

.venv/.complete: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder -m "not long" --durations=10

test-all: setup
	$(BIN)/python tools/test_all.py $(NAMES) --workers $(WORKERS) --minutes $(MINUTES) $(if $(RECORD),--record)

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

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# a folder for each public data set, as benchmarks/training_loop.py reads it
DATA ?= ../shared/data

.PHONY: setup demo test lint bench docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fedproxy needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## the whole job on the bundled LLM and data
	$(BIN)/fedproxy demo --out runs/demo --overwrite

test: setup  ## the fast tests on all cores, then the slow ones, which use all cores themselves
	$(BIN)/python -m pytest -n auto -m "not slow"
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## measure, and write benchmarks/results/*.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/merge_memory.py
	$(BIN)/python benchmarks/training_loop.py --data $(DATA)
	$(BIN)/python benchmarks/merge_engine.py
	$(BIN)/python benchmarks/wire_speed.py
	$(BIN)/python benchmarks/federation.py
	$(BIN)/python benchmarks/handout.py --bytes 1e9 --work runs/handout  # 4 GB of disk
	$(BIN)/python benchmarks/large_model.py --work runs/large  # 40 GB of disk
	$(BIN)/python benchmarks/demo_quality.py
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/dry_run.py
	$(BIN)/python benchmarks/render.py

docs: setup  ## render docs/benchmarks.md from benchmarks/results
	$(BIN)/python benchmarks/render.py
	$(BIN)/python scripts/render_configuration.py

clean:
	rm -rf .venv runs

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# the environment that has bitsandbytes, which slows every import of peft and warns: .venv, and one package more
QLORA := .venv/qlora
# the environments of a release: the tools that make it, and what a user gets who installs it
RELEASE := build/release
# the environment that has the oldest release of Flower that is supported, over .venv, which has the newest
FLOWER := .venv/flower
FLOWER_VERSION := 1.41.0
# what stands on Flower's own behaviour: its messages, its processes, and how these end; of whole runs, one of each kind
FLOWER_TESTS := tests/deployment/flower tests/deployment/test_joining.py tests/deployment/test_serving.py \
	tests/deployment/test_whole_run.py::test_the_whole_run_over_tls \
	tests/deployment/test_kills.py::test_a_killed_client_costs_the_round_its_reply_and_may_come_back
# the environment that has the tools of the site, over .venv
DOCS := .venv/docs
# a folder for each public data set, as benchmarks/training_loop.py reads it
DATA ?= ../shared/data

# Tests run side by side, a thread each: two trainings of two threads on two cores slow each other down fourfold. A file's
# stay together, so that they share what they made. Those that train or start processes run two at a time, however many
# cores there are: with three, Flower's processes start too late for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
# the files of tests with a mark: to import all the others takes every worker half a minute
MARKED = $$(grep -rlE --include='*.py' 'mark\.($(1))\b' tests | sort)
BASE := tests/aggregation tests/contracts tests/test_artifacts.py tests/test_checkpoint_files.py tests/test_config.py \
	tests/test_data.py tests/test_layer_map.py tests/test_seeds.py tests/test_tensor_files.py tests/test_tensors.py

.PHONY: setup demo check test test-all qlora flower lint bench docs release clean help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(READY)  ## .venv with all that follows needs, versions from constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fedproxy needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## the whole job on the bundled LLM and data
	$(BIN)/fedproxy demo --out runs/demo --overwrite

check: lint  ## lint, types, maths, contracts, configuration
	$(PYTEST) -n auto -m "not slow and not long" $(BASE)

test: setup  ## all but the long tests
	$(PYTEST) -n auto -m "not slow and not long"
	$(PYTEST) -n 2 -m "slow and not long" $(call MARKED,slow)

test-all: setup qlora flower docs  ## everything, as CI runs it
	$(PYTEST) -n auto -m "not slow and not long"
	$(PYTEST) -n 2 -m "slow or long" $(call MARKED,slow|long)

qlora: $(QLORA)/.ready  ## the tests of 4-bit weights, in an environment that has bitsandbytes
	$(QLORA)/bin/python -m pytest -m qlora -W 'ignore:.torch.jit.script:DeprecationWarning' $(call MARKED,qlora)

flower: $(FLOWER)/.ready  ## the tests that stand on Flower, with the oldest release of it that is supported
	$(subst $(BIN)/,$(FLOWER)/bin/,$(PYTEST)) -n 2 $(FLOWER_TESTS)

$(FLOWER)/.ready: $(READY)
	$(PYTHON) -m venv $(FLOWER)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(FLOWER)/bin/python -m pip install --quiet --no-deps flwr==$(FLOWER_VERSION)
	touch $@

$(QLORA)/.ready: $(READY)
	$(PYTHON) -m venv $(QLORA)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(QLORA)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(QLORA)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[qlora]'
	touch $@

lint: setup  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## measure, and write benchmarks/results/*.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/merge_memory.py
	$(BIN)/python benchmarks/training_loop.py --data $(DATA)
	$(BIN)/python scripts/fetch_small_llm.py smollm2 runs/smollm2
	$(BIN)/python benchmarks/lora_layers.py --llm runs/smollm2 --data $(DATA)
	$(BIN)/python benchmarks/busy_machine.py --data $(DATA)
	$(BIN)/python benchmarks/scoring.py --llm runs/smollm2 --data $(DATA)
	$(BIN)/python benchmarks/merge_engine.py
	$(BIN)/python benchmarks/wire_speed.py
	$(BIN)/python benchmarks/federation.py
	$(BIN)/python benchmarks/handout.py --bytes 1e9 --work runs/handout  # 4 GB of disk
	$(BIN)/python benchmarks/large_model.py --work runs/large  # 40 GB of disk
	$(BIN)/python benchmarks/demo_quality.py
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/dry_run.py
	$(BIN)/python benchmarks/render.py

docs: $(DOCS)/.ready  ## render the pages made from results and code, and build the site of all pages in build/site
	$(BIN)/python benchmarks/render.py
	$(BIN)/python scripts/render_configuration.py
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

$(DOCS)/.ready: $(READY)
	$(PYTHON) -m venv $(DOCS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(DOCS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

release:  ## sdist, wheel, their dependencies with hashes, and what is in them (SBOM), in dist/
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet --constraint constraints.txt build cyclonedx-bom pip-tools
	$(RELEASE)/tools/bin/python -m build --outdir dist
	$(RELEASE)/tools/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-emit-index-url \
		--no-emit-trusted-host --no-emit-find-links --constraint constraints.txt --extra federation \
		--output-file dist/requirements.lock pyproject.toml
	$(PYTHON) -m venv --without-pip $(RELEASE)/runtime
	$(RELEASE)/tools/bin/python -m pip --python $(RELEASE)/runtime/bin/python install --quiet --require-hashes -r dist/requirements.lock
	$(RELEASE)/tools/bin/python -m pip --python $(RELEASE)/runtime/bin/python install --quiet --no-deps dist/*.whl
	$(RELEASE)/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file dist/sbom.cdx.json $(RELEASE)/runtime

clean:  ## remove what make made
	rm -rf .venv build dist runs

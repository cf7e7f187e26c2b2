# make demo | test | test-cluster | test-page | check | docs | ui; everything runs in .venv, made on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs

.PHONY: help demo test test-cluster test-page check docs ui env clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

env: $(VENV)/.ready  ## the environment (made by the other targets when it is missing)

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "making $(VENV): some minutes and about 6 GB on a machine without torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env  ## the whole main line on a synthetic set, with its table
	test -f data/demo/index.json || $(BIN)/esol-shards create synthetic --out data/demo
	$(BIN)/accelerate launch --config_file launch/cpu.yaml --num_processes 1 esol/train.py --config configs/demo.yaml

test: env  ## all tests that need neither a GPU nor root
	# a file's tests share what they build, and run on one core; the folders of long ones are first by name
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

test-cluster: env  ## as root on Linux: two machines as network namespaces, a real SLURM (apt-get install slurm-wlm munge)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	ESOL_CLUSTER=1 $(BIN)/python -m pytest tests/test_launch_files.py tests/distributed/test_nodes.py tests/distributed/test_slurm.py

test-page: env  ## the report page in headless Chromium (apt-get install chromium chromium-driver)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,page]'
	ESOL_PAGE=1 $(BIN)/python -m pytest tests/page

check: env  ## lint and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: env  ## the pages of docs/ as a site in site/, every link checked
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

ui: env  ## MLflow's pages of the newest run in runs/, on 127.0.0.1:5000
	$(BIN)/esol ui $(RUNS)

clean:  ## removes runs and generated data, not the environment
	rm -rf $(RUNS) data/demo

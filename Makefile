.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline

# What is installed: the releases of slimstep/constraints.txt, with TORCH=2.11.0 another torch of its range, or with
# LATEST=1 the newest releases that pyproject.toml allows.
OLDEST_TORCH := 2.11.0
READY := $(VENV)/ready$(if $(LATEST),-latest)$(TORCH:%=-torch-%)
RELEASES := $(if $(LATEST),--upgrade --upgrade-strategy eager,-c slimstep/constraints.txt) $(TORCH:%=torch==%)

# The folders within slimstep/, as an installed copy has them: what reads sources without running them follows no __path__.
SOURCES := .sources

$(SOURCES): slimstep
	mkdir -p $@/slimstep
	ln -sfn $(foreach path,$(wildcard slimstep/*.py) slimstep/commands data distill engine eval models prune,../../$(path)) $@/slimstep

$(READY): pyproject.toml slimstep/constraints.txt
	@echo "setting up $(VENV) (torch and friends, some minutes, about 6 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "slimstep needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on $(RELEASES) -e '.[dev,docs]'
	rm -f $(VENV)/ready*
	touch $@

.PHONY: help setup demo test slow huge lint types docs tested clean

help:  ## explain the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## create the environment and install the tested releases (LATEST=1: the newest)

demo: setup  ## the whole method on the bundled model, in five minutes on two cores; prints tables and the report
	$(BIN)/python train.py +experiment=snapfusion budget=demo data.pairs.size=1024

test: setup $(SOURCES)  ## the fast tests, on CPU, without network, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup $(SOURCES)  ## the slow tests (minutes each), on CPU, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu and not huge"

huge: setup  ## ten minutes and 20 GB of memory: steps of every training of a random Stable Diffusion 1.5
	$(BIN)/python -m pytest -m huge

lint: setup  ## ruff
	$(BIN)/ruff check .

types: setup $(SOURCES)  ## mypy, over the interfaces that pyproject.toml lists
	$(BIN)/mypy

docs: setup $(SOURCES)  ## the documentation as a site, site/index.html; a dead link inside it is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tested:  ## raise slimstep/constraints.txt: every test with the newest releases, the file and README's line, the fast ones with the oldest torch
	rm -rf .venv-latest .venv-oldest
	$(MAKE) lint types docs test slow VENV=.venv-latest LATEST=1
	.venv-latest/bin/python scripts/tested_set.py
	$(MAKE) test VENV=.venv-oldest TORCH=$(OLDEST_TORCH)

clean:  ## remove runs, caches and the environment
	rm -rf $(VENV) .venv-latest .venv-oldest runs outputs site $(SOURCES) .mypy_cache .pytest_cache .ruff_cache

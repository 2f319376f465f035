.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline

$(VENV)/ready: pyproject.toml
	@echo "setting up $(VENV) (torch and friends, some minutes, about 6 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "slimstep needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	touch $@

.PHONY: help setup demo test slow huge lint clean

help:  ## explain the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/ready  ## create the environment and install

demo: setup  ## the whole method on the shipped model, in ten minutes on two cores; prints tables and the report
	$(BIN)/python train.py +experiment=snapfusion budget=demo

test: setup  ## the fast tests, on CPU, without network, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup  ## the slow tests (minutes each), on CPU, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu and not huge"

huge: setup  ## ten minutes and 15 GB of memory: steps of every training of a random Stable Diffusion 1.5
	$(BIN)/python -m pytest -m huge

lint: setup  ## ruff
	$(BIN)/ruff check .

clean:  ## remove runs, caches and the environment
	rm -rf $(VENV) runs outputs .pytest_cache .ruff_cache

# Two commands matter: `make demo` and `make test`. Both create .venv by themselves and reuse it.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export WANDB_MODE ?= offline
export MPLBACKEND ?= Agg

.PHONY: help demo test test-fast parity lint format bench results clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "camtrain needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed ## Set up, then train the phantom twice (plain, mask loss) and set the two side by side
	$(BIN)/python recipes/phantom_before_after.py

test: $(VENV)/.installed ## Set up, then run every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.installed ## The tests that take under two minutes together
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

PARITY := .venv-parity
$(PARITY)/.installed: pyproject.toml constraints.txt tests/parity/requirements.txt
	test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet -c constraints.txt -e . -r tests/parity/requirements.txt
	touch $@

parity: $(PARITY)/.installed ## Compare with grad-cam, torchcam, captum, MONAI and zennit, in an environment of its own
	CAMTRAIN_PARITY=1 $(PARITY)/bin/python -m pytest tests/parity

lint: $(VENV)/.installed ## ruff (lint and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## Let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## Measure the cost of the mask loss (interleaved pairs; ratios, not times)
	$(BIN)/python benchmarks/step_cost.py

results: $(VENV)/.installed ## Rebuild the tables of docs/results.md (about an hour on 2 cores)
	$(BIN)/python benchmarks/phantom_study.py claim --epochs 10
	$(BIN)/python benchmarks/phantom_study.py claim --epochs 10 --cooccurrence 0.6 --out runs/study/cooccurrence
	$(BIN)/python benchmarks/phantom_study.py shortcut --net flatten --epochs 10 --out runs/study/flatten
	$(BIN)/python benchmarks/phantom_study.py shortcut --net resnet18q --epochs 12 --out runs/study/resnet

clean: ## Remove what the targets made
	rm -rf $(VENV) $(PARITY) runs .demo .pytest_cache .mypy_cache .ruff_cache

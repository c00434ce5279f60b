# Two commands matter: `make demo` and `make test`. Both create .venv by themselves and reuse it.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export WANDB_MODE ?= offline
export MPLBACKEND ?= Agg

.PHONY: help demo test test-fast parity lint format bench results figures clean
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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.installed ## The tests that take under two minutes together
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

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

bench: $(VENV)/.installed ## Measure what camtrain costs and write docs/performance.md (about 6 hours on 2 cores, parts one by one)
	$(BIN)/python benchmarks/run_all.py

results: $(VENV)/.installed ## Rebuild the tables of docs/results.md (about an hour on 2 cores)
	$(BIN)/python benchmarks/phantom_study.py claim --epochs 10
	$(BIN)/python benchmarks/phantom_study.py claim --epochs 10 --cooccurrence 0.6 --out runs/study/cooccurrence
	$(BIN)/python benchmarks/phantom_study.py shortcut --net flatten --epochs 10 --out runs/study/flatten
	$(BIN)/python benchmarks/phantom_study.py shortcut --net resnet18q --epochs 12 --out runs/study/resnet

figures: $(VENV)/.installed ## Remake the figures of README and docs/results (hours on 2 cores; goes on where it stopped)
	$(BIN)/python recipes/phantom_before_after.py && cp runs/demo/before_after.png docs/
	$(BIN)/python recipes/shortcut_study.py arms organs masks ways wide --workers 2
	cp runs/shortcuts/shortcut_study.png docs/results/
	$(BIN)/python recipes/hirescam_paper.py && $(BIN)/python recipes/hirescam_paper.py --arms AxialNet && cp runs/hirescam_paper/hirescam_paper.png docs/results/
	$(BIN)/python recipes/gradcam_wrong_place.py && cp runs/gradcam_wrong_place/flatten.png docs/results/gradcam_wrong_place.png
	$(BIN)/python recipes/voc_hirescam.py && cp runs/voc_hirescam/flatten.png docs/results/voc_hirescam.png
	$(BIN)/python recipes/respond_cam.py && cp runs/respond_cam/respond_cam*.png docs/results/
	$(BIN)/python recipes/relevance_cam.py --out runs/relevance_cam
	$(BIN)/python recipes/relevance_pictures.py --models runs/relevance_cam
	$(BIN)/python recipes/prune_by_relevance.py --models runs/relevance_cam
	cp runs/prune_by_relevance/prune_by_relevance.png docs/results/
	cp runs/relevance_pictures/depth_resnet.png docs/results/relevance_cam.png
	cp runs/relevance_pictures/depth_vgg.png docs/results/relevance_cam_vgg.png
	cp runs/relevance_pictures/cascade_resnet.png docs/results/relevance_cam_cascade.png
	cp runs/relevance_pictures/cascade_resnet_chart.png docs/results/relevance_cam_cascade_chart.png
	$(BIN)/python recipes/bias_audit.py && cp runs/bias_audit/bias_audit.png docs/results/
	$(BIN)/python recipes/error_gallery.py && cp runs/error_gallery/errors.png docs/results/gradcam_paper.png
	$(BIN)/python recipes/reader_study.py && cp runs/reader_study/reader_study.png docs/results/

clean: ## Remove what the targets made
	rm -rf $(VENV) $(PARITY) runs .demo .pytest_cache .mypy_cache .ruff_cache

# Everything runs from here: `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SCALE ?= small
SEEDS ?=
WORKERS ?= 2

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-zA-Z_%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## /\1\t/' | expand -t 34

# The stamps make a second call of any target immediate; a changed pyproject or constraints file installs again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "stabletrain needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lint: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

.PHONY: install
install: $(VENV)/.installed ## Create the virtual environment and install the program

.PHONY: demo
demo: $(VENV)/.installed ## Install, then train a diffusion model on handwritten digits (about two minutes)
	$(BIN)/stabletrain diffusion --scalelong

.PHONY: test
test: $(VENV)/.installed-test ## Install, then run the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15

.PHONY: test-units
test-units: $(VENV)/.installed-test ## Run the units: no whole commands, no whole networks
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

.PHONY: test-gpu
test-gpu: $(VENV)/.installed-test ## Run the tests that need an NVIDIA GPU
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu

# As published, against PyTorch in the same run; each has its share of ten minutes. GPU_PYTHON names the interpreter that
# has JAX and PyTorch for the GPU. The data of md_window are rMD17's aspirin, named by STABLETRAIN_TEST_DATA.
GPU_PYTHON ?= $(BIN)/python
GPU_RESULTS = benchmarks/results/gpu
.PHONY: benchmarks-gpu
benchmarks-gpu: ## On an NVIDIA GPU with PyTorch beside JAX: every speed as published, in ten minutes
	@mkdir -p $(GPU_RESULTS)
	-timeout 130 $(GPU_PYTHON) -m benchmarks.diffusion_throughput --case uvit-s2 --batch 128 --precision bfloat16 --out $(GPU_RESULTS)/diffusion_throughput.json
	-timeout 130 $(GPU_PYTHON) benchmarks/gan_step.py --batch 128 --d-steps 5 --turns 10 --out $(GPU_RESULTS)/gan_step.json
	-timeout 100 $(GPU_PYTHON) benchmarks/gradient_penalty.py --platform cuda --turns 11 --out $(GPU_RESULTS)/gradient_penalty.json
	-timeout 100 $(GPU_PYTHON) benchmarks/continual_step.py --network resnet18 --repeats 5 --methods sum spcl pcgrad --out $(GPU_RESULTS)/continual_step.json
	-timeout 130 $(GPU_PYTHON) benchmarks/md_window.py --device gpu --work 16384 $(if $(STABLETRAIN_TEST_DATA),--data $(STABLETRAIN_TEST_DATA)/rmd17_aspirin.npz) --out $(GPU_RESULTS)/md_window.json

.PHONY: lint
lint: $(VENV)/.installed-lint ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# table-scalelong-feature-norm is the table scalelong/feature-norm: the first dash after the paper becomes a slash.
table_name = $(subst $(firstword $(subst -, ,$(1)))-,$(firstword $(subst -, ,$(1)))/,$(1))
# SEEDS=5 are the seeds 0 to 4; without it each table has as many as its table.toml says, five if it says nothing.
SEED_OPTION = $(if $(SEEDS),--seeds 0-$(shell expr $(SEEDS) - 1))

.SECONDARY:
.PHONY: tables
tables: $(VENV)/.installed ## Run what is missing of every table and render all (SCALE=small|paper SEEDS=5)
	$(BIN)/stabletrain table --all --scale $(SCALE) $(SEED_OPTION) --run
	$(BIN)/stabletrain table --reproducibility REPRODUCIBILITY.md

table-%: $(VENV)/.installed ## One table, e.g. table-scalelong-feature-norm SCALE=small SEEDS=5
	$(BIN)/stabletrain table $(call table_name,$*) --scale $(SCALE) $(SEED_OPTION) --run

table-wgan_gp-random-architectures: $(VENV)/.installed ## Random architectures, with tests of who trains more of them
	-$(BIN)/stabletrain table wgan_gp/random-architectures --scale $(SCALE) $(SEED_OPTION) --run
	$(BIN)/stabletrain gan random-architectures runs/wgan_gp-random-architectures-$(SCALE) \
		--metric $(if $(filter paper,$(SCALE)),eval/is50k_10splits_inception2015_raw,eval/cs1k_1split_digits-classifier_raw) \
		$(if $(filter paper,$(SCALE)),$(foreach score,1 2 3 4 5 6 7 8 9,--minimum $(score))) --out results/$(SCALE)/wgan_gp

figure-%: table-% ## The figures of a table; the same runs
	@true

TOY_FIGURES = figure-wgan_gp-value-surfaces figure-wgan_gp-gradient-norms
$(TOY_FIGURES): figure-wgan_gp-%: $(VENV)/.installed ## WGAN-GP's figures on toys (SCALE=small|paper)
	$(BIN)/stabletrain gan $* --config experiments/wgan_gp/$*/figure.toml --scale $(SCALE) --out results/$(SCALE)/wgan_gp/$*

DIFFUSION_FIGURES = figure-scalelong-theory figure-scalelong-frontier
.PHONY: $(DIFFUSION_FIGURES)
$(DIFFUSION_FIGURES): figure-scalelong-%: $(VENV)/.installed ## ScaleLong's theorems, and the largest learning rates
	$(BIN)/stabletrain diffusion $* --config experiments/scalelong/$*/figure.toml --scale $(SCALE) --out results/$(SCALE)/scalelong/$*

.PHONY: clean
clean: ## Remove the virtual environment and caches (never runs or results)
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist

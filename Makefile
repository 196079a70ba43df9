# Every target does its own set-up: a Python with venv and make are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RUN := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-all benchmark lint format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## Fine-tune the built-in DiT on a new style and generate (outputs/demo)
	$(RUN) -m slora_diffusers.cli demo --output-dir outputs/demo

test: $(VENV)/.test ## Run the fast tests
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow" -q

test-all: $(VENV)/.test ## Run every test
	$(RUN) -m pytest -n 2 --dist loadfile -q

benchmark: $(VENV)/.test ## Measure against PEFT's LoRA; results go to benchmarks/results
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.lifecycle
	$(RUN) -m benchmarks.demo_quality
	$(RUN) -m benchmarks.training_memory
	$(RUN) -m benchmarks.dreambooth
	$(RUN) -m docs.build_tables

lint: $(VENV)/.lint ## Check format, style, types and the docs' tables
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(RUN) -m docs.build_tables --check

format: $(VENV)/.lint ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .ruff_cache

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its pin alone: a later requirement then finds it there.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	touch $@

# timm and xformers would pull in torchvision and CUDA builds; the tests need neither. timm without torchvision stays in a
# folder of its own, where only tests/tiny_vision.py looks: the `accelerate` command imports every timm that it finds.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[test]'
	$(PIP) --no-deps xformers
	$(PIP) --no-deps --upgrade --target $(VENV)/timm timm
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) -e '.[lint]'
	touch $@

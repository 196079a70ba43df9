# Every target does its own set-up: a Python with venv and make are all that a fresh machine needs.
# .venv is for developing (tests, lint, benchmarks), .venv-demo for the demo: what a user installs and nothing else,
# .venv-oldest for the oldest versions that pyproject.toml promises, .venv-app for `slora app`: gradio wants an older Pillow.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
INSTALL := bin/pip install --quiet --disable-pip-version-check
FAST := -m pytest -n 2 --dist loadfile -q -m "not slow"

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest test-app benchmark benchmark-gpu lint docs docs-serve format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv-demo/.done ## Fine-tune the built-in DiT on a new style and generate (outputs/demo)
	.venv-demo/bin/slora demo --output-dir outputs/demo

test: $(VENV)/.test ## Run the fast tests
	$(RUN) $(FAST)

test-all: $(VENV)/.test ## Run every test
	$(RUN) -m pytest -n 2 --dist loadfile -q

test-oldest: .venv-oldest/.done ## Run the fast tests on the oldest versions that pyproject.toml promises
	.venv-oldest/bin/python $(FAST)

test-app: .venv-app/.done ## Run the tests of `slora app` in a browser (needs chromium)
	.venv-app/bin/python -m pytest -q -W ignore::ResourceWarning tests/test_app_browser.py

benchmark: $(VENV)/.test ## Measure against PEFT's LoRA; results go to benchmarks/results
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.lifecycle
	$(RUN) -m benchmarks.demo_quality
	$(RUN) -m benchmarks.training_memory
	$(RUN) -m benchmarks.dreambooth
	$(RUN) -m docs.build_tables

benchmark-gpu: $(VENV)/.test ## On a machine with a CUDA GPU: is every verb right there, and what does it cost
	$(RUN) -m benchmarks.gpu

lint: $(VENV)/.lint ## Check format, style, types and the docs' tables
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(RUN) -m docs.build_tables --check

docs: $(VENV)/.docs ## Build the documentation site (site/), warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs ## Show the site while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: $(VENV)/.lint ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environments and everything generated
	rm -rf $(VENV) .venv-demo .venv-oldest .venv-app outputs site build dist *.egg-info .pytest_cache .ruff_cache

# torch first and by its pin alone: a later requirement then finds it there.
$(VENV)/.torch .venv-demo/.torch .venv-app/.torch: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) -c constraints.txt torch
	touch $@

.venv-app/.done: .venv-app/.torch pyproject.toml
	sed 's/^pillow==.*/pillow==12.3.0/' constraints.txt > $(@D)/constraints.txt
	$(@D)/$(INSTALL) -c $(@D)/constraints.txt -e '.[app,test]' playwright
	touch $@

.venv-demo/.done: .venv-demo/.torch pyproject.toml
	.venv-demo/$(INSTALL) -c constraints.txt -e '.[cli]'
	touch $@

# timm and xformers would pull in torchvision and CUDA builds; the tests need neither. timm without torchvision stays in a
# folder of its own, where only tests/tiny/vision.py looks: the `accelerate` command imports every timm that it finds.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(VENV)/$(INSTALL) -c constraints.txt -e '.[test,ray]'
	$(VENV)/$(INSTALL) -c constraints.txt --no-deps xformers
	$(VENV)/$(INSTALL) -c constraints.txt --no-deps --upgrade --target $(VENV)/timm timm
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(VENV)/$(INSTALL) -c constraints.txt -e '.[lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(VENV)/$(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

.venv-oldest/.done: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/$(INSTALL) -c constraints-oldest.txt -e '.[test]'
	$(@D)/$(INSTALL) -c constraints-oldest.txt --no-deps --upgrade --target $(@D)/timm timm
	touch $@

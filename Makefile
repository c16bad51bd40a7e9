# Everything a person or CI does with MoEscope, one word each. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help

help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(INSTALL) --editable . --group dev
	@touch $(READY)

install: $(READY) ## Install MoEscope and what its tests need into .venv

demo: $(READY) ## Capture the bundled trained model on the bundled corpus, analyse it, say what was found
	$(BIN)/moescope demo --out runs/demo

test: $(READY) ## Run the tests, a process for each core
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(READY) ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# hooks/, app/ and data/ are packages of moescope that live beside it; pyright must see them in one tree.
types: $(READY) ## Check types
	@rm -rf build/types && mkdir -p build/types
	@cp -R moescope build/types/ && cp -R hooks app data build/types/moescope/
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY) ## Run the benchmarks (three quarters of an hour, on an idle machine) and write their results files
	for name in capture decoding applying analyses app; do $(BIN)/python -m tests.benchmarks.$$name || exit 1; done
	$(BIN)/python -m tests.readme

families: $(READY) ## Check every family of the zoo and write the README's table of them
	$(BIN)/python -m tests.zoo.table

readme: $(READY) ## Write the README's tables from the registry and the results files
	$(BIN)/python -m tests.readme

clean: ## Remove what was made here, except captured stores
	rm -rf $(VENV) build dist *.egg-info

.PHONY: help install demo test lint types bench families readme clean

# Everything sets itself up from nothing: a virtual environment in .venv, exact versions from constraints.txt.
#   make PYTHON=python3.12 test    takes another interpreter (3.11 or later)
#   make VENV=../venv test         puts the environment elsewhere

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv lint test demo clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-6s %s\n", $$1, $$2}'

venv: $(STAMP)  ## set up the environment only

# torch goes first and alone: its version decides which of several large builds is fetched
$(STAMP): pyproject.toml constraints.txt vramplan/planner/_replay.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

lint: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, then the whole test suite
	$(BIN)/python -m pytest -q -n auto --dist worksteal

demo: $(STAMP)  ## plan, train, sample and report on a CPU, in a few minutes
	$(BIN)/python examples/demo.py

clean:  ## remove the environment, caches and what the demo wrote
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis demo-run build dist *.egg-info vramplan/planner/*.so

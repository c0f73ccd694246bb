# Needs only Python >= 3.10 and make; everything else is installed into .venv once, and again when the pins change.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check bench performance faults compat docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install thriftnet with all its tools

demo: $(STAMP) ## train a small ResNet plain and with each technique on real digits; writes demo/report.html
	$(BIN)/thriftnet demo $(ARGS)

test: $(STAMP) ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(STAMP) ## run the rest: large networks, and a whole one through the compiler
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

check: $(STAMP) ## lint, formatting, types, and which room imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## time every technique against its floor; ARGS='--check shift' for one topic and an exit code
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(ARGS)

performance: $(STAMP) ## measure everything, a quarter of an hour on a quiet core; writes docs/performance.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.page $(ARGS)

faults: $(STAMP) ## kill, fill, damage and attack; writes docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m faults --page docs/reliability.md $(ARGS)

compat: $(STAMP) ## try every technique on every family of timm and torchvision, and on odd modules; writes docs/compatibility.md
	OMP_NUM_THREADS=1 $(BIN)/python -m compat --cells build/compat.jsonl --page docs/compatibility.md $(ARGS)

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove build outputs and caches; .venv, demo/ and runs/ stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks faults compat -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("thriftnet needs Python >= 3.10: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# make demo   set up and draw four pictures into demo/
# make test   set up, check and test
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo setup test check test-gpu clean

# PASSIVE: threads that wait give up their core; otherwise a busy machine draws many times slower.
demo: .venv/.demo
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/first_pictures.py demo

setup: .venv/.dev

test: check
	$(BIN)/python -m pytest -q -n 2

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_budget.py

test-gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# Stamps, so that each set-up runs once, and again only when what it installs has changed.
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/.dev: .venv/.demo
	$(INSTALL) -e '.[dev]'
	touch $@
